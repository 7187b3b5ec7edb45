"""Dialects: the ways to write a milter. A dialect answers the jobs of one milter."""
