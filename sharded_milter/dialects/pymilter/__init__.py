"""Existing pymilter scripts."""
