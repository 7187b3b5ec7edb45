"""Existing pymilter scripts, run unmodified."""
