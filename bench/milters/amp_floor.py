"""The least that a Twisted master with AMP workers costs, whoever wrote it.

amp_floor.py SOCKET MS WORKERS. It cuts what the MTA says into packets, gives each message to a
worker in one AMP call and hands the answer on, at once both ways. There is nothing else: no state
table, no checks, no log, no deadlines, no message above AMP's 64 KB. What ours takes more than
this is ours to account for.
"""

import os
import socket
import struct
import sys
import time
from collections import deque

from twisted.internet import protocol, reactor
from twisted.protocols import amp

# What ours agrees on for this milter: no answers before the end of the message, no DATA, no
# UNKNOWN, no EOH.
PROTOCOL = 0x8F3C0
ADD_HEADERS = 0x1
AGREED = struct.pack(">IcIII", 13, b"O", 6, ADD_HEADERS, PROTOCOL)

OPTNEG, MACRO, EOM, ABORT, QUIT = b"ODEAQ"

# The header is added behind the last one, then the message accepted.
ANSWER = struct.pack(">IcI", 16, b"i", 0x7FFFFFFF) + b"X-Bench\0 1\0" + b"\0\0\0\1a"

# One job is done and one waits in the worker's socket.
JOBS_A_WORKER = 2

CHANNEL = 3


def packets(data, at=0):
    """Letter, begin and end of each packet that is complete."""
    while len(data) - at >= 5:
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield data[at + 4], at, end
        at = end


def send(transport, data):
    """Sends it now, not in the reactor's next turn; only what does not fit waits for that."""
    if transport.dataBuffer or transport._tempDataBuffer:  # nothing is overtaken
        transport.write(data)
        return
    sent = transport.writeSomeData(data)
    if isinstance(sent, int) and sent < len(data):  # else the connection is lost
        transport.write(data[sent:])


class Scan(amp.Command):
    arguments = [(b"message", amp.String())]  # noqa: RUF012
    response = [(b"replies", amp.String())]  # noqa: RUF012


class Boxes(amp.AMP):
    def sendBox(self, box):
        send(self.transport, box.serialize())


class Worker(Boxes):
    """Takes the message apart, burns some CPU time if told so, and adds a header."""

    burn = 0.0

    @Scan.responder
    def scan(self, message):
        for _ in packets(message):
            pass
        until = time.thread_time() + self.burn
        while self.burn and time.thread_time() < until:
            sum(range(1000))
        return {"replies": ANSWER}

    def connectionLost(self, reason):
        reactor.stop()


class Master(protocol.Factory):
    """Gives messages to workers in turn; what they cannot take yet waits."""

    def __init__(self):
        self.free = deque()
        self.waiting = deque()

    def start(self, ms):
        """One more worker."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        reactor.spawnProcess(
            protocol.ProcessProtocol(),
            sys.executable,
            [sys.executable, __file__, "worker", ms],
            env=os.environ,
            childFDs={0: "w", 1: 1, 2: 2, CHANNEL: theirs.fileno()},
        )
        theirs.close()
        worker = adopt(ours.fileno(), Boxes())
        ours.close()
        return worker

    def buildProtocol(self, address):
        return MTA(self)

    def ask(self, message, mta):
        if self.free:
            worker = self.free.popleft()
            worker.callRemote(Scan, message=message).addCallback(self.answered, worker, mta)
        else:
            self.waiting.append((message, mta))

    def answered(self, answer, worker, mta):
        self.free.append(worker)
        if self.waiting:
            self.ask(*self.waiting.popleft())
        send(mta.transport, answer["replies"])


class MTA(protocol.Protocol):
    """One connection of the MTA."""

    def __init__(self, master):
        self.master = master
        self.unread = b""
        self.message = []

    def dataReceived(self, data):
        data, end = self.unread + data, 0
        for letter, start, end in packets(data):
            if letter == OPTNEG:
                send(self.transport, AGREED)
            elif letter == ABORT:
                self.message.clear()
            elif letter == QUIT:
                self.transport.loseConnection()
            elif letter != MACRO:
                self.message.append(data[start:end])
                if letter == EOM:
                    message, self.message = b"".join(self.message), []
                    self.master.ask(message, self)
        self.unread = data[end:]


def adopt(descriptor, amp_protocol):
    """Speaks AMP over a socket that is connected."""
    factory = protocol.Factory.forProtocol(lambda: amp_protocol)
    reactor.adoptStreamConnection(descriptor, socket.AF_UNIX, factory)
    return amp_protocol


def serve(listen, ms, workers):
    master = Master()
    started = [master.start(ms) for _ in range(workers)]
    master.free.extend(started * JOBS_A_WORKER)
    kind, _, address = listen.partition(":")
    if kind == "unix":
        reactor.listenUNIX(address, master)
    else:
        port, _, host = address.partition("@")
        reactor.listenTCP(int(port), master, interface=host)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        os.set_blocking(CHANNEL, False)
        Worker.burn = float(sys.argv[2]) / 1000
        adopt(CHANNEL, Worker())
    else:
        serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    reactor.run()
