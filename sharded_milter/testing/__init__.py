"""Talking to a milter without an MTA."""
