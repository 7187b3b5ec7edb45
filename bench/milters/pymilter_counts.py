"""pymilter: counts the bytes of a body and keeps nothing, then adds one header.

pymilter_counts.py SOCKET MS, of which MS is not used.
"""

import sys

import Milter


class Counts(Milter.Base):
    """The body is all that it asks for."""

    size = 0

    @Milter.noreply
    def body(self, chunk):
        self.size += len(chunk)
        return Milter.CONTINUE

    def eom(self):
        self.addheader("X-Bench", str(self.size))
        self.size = 0
        return Milter.ACCEPT


Milter.factory = Counts
Milter.set_flags(Milter.ADDHDRS)
Milter.runmilter("bench", sys.argv[1], 240)
