"""Milters that are functions."""
