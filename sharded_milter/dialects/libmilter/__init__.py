"""Milters that are classes with xxfi_ callbacks."""
