"""pymilter: has the message in hand at its end, then adds one header.

pymilter_peer.py SOCKET MS. Runs under the Python that has pymilter; its threads share one GIL.
"""

import sys
import time

import Milter

SOCKET, BURN = sys.argv[1], float(sys.argv[2]) / 1000


class Peer(Milter.Base):
    """Waits with its answers for the end of the message, as the MTA's packets allow."""

    @Milter.noreply
    def connect(self, name, family, address):
        return Milter.CONTINUE

    @Milter.noreply
    def hello(self, name):
        return Milter.CONTINUE

    @Milter.noreply
    def envfrom(self, sender, *esmtp):
        self.fields, self.chunks = [], []
        return Milter.CONTINUE

    @Milter.noreply
    def envrcpt(self, recipient, *esmtp):
        return Milter.CONTINUE

    @Milter.noreply
    def header(self, name, value):
        self.fields.append((name, value))
        return Milter.CONTINUE

    @Milter.noreply
    def body(self, chunk):
        self.chunks.append(chunk)
        return Milter.CONTINUE

    def eom(self):
        until = time.thread_time() + BURN
        while BURN and time.thread_time() < until:
            sum(range(1000))
        self.addheader("X-Bench", "1")
        return Milter.ACCEPT


Milter.factory = Peer
Milter.set_flags(Milter.ADDHDRS)
Milter.runmilter("bench", SOCKET, 240)
