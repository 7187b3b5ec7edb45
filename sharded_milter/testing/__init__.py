"""Test a milter without an MTA."""
