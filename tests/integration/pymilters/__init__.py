"""Existing pymilter scripts, untouched, on plain pymilter as the reference."""
