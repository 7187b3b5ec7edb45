"""Many MTAs at once that behave badly, and the check that every answer is of its own message.

`python -m bench.chaos` runs the plan: each kind of milter under each trouble, over both kinds of
socket. Every message is unique, and everything in its answer must be made of it alone, so that a
part of another message's answer is seen and named.

Read in this order: `messages` (what is sent), `answers` (what must come back), `mta` (how it is
sent), `attack` (many of them), `daemon` (what is attacked), `troubles`, `kinds`, `plan`. `liar`
mixes answers on their way, to show that this is noticed.
"""
