"""The master: holds every MTA connection, speaks the protocol, gives jobs to workers.

It imports no author's code, so nothing an author writes can stall or crash it.
"""
