"""Milters made of functions."""
