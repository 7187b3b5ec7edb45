"""Measure a milter under load, find what limits it, and recommend a number of workers."""
