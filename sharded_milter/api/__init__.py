"""What an author of milters touches: values, verdicts, actions, `Milter`. No I/O, no Twisted."""
