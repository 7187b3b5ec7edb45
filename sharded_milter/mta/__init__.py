"""MTA connections: from bytes of a socket to questions, and from answers back."""
