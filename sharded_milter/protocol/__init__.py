"""The milter protocol as pure values and functions: bytes in, bytes out; no I/O, no clock.

Reading order: text, wire, packets, stages, commands, replies, negotiation, answers, session.
"""
