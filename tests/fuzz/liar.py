"""A worker at the other end of a real socket, which says whatever it likes; and its master."""

from __future__ import annotations

import array
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from twisted.internet.task import Clock
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.ipc.messages import Ready
from sharded_milter.limits import Limits
from sharded_milter.pool.pool import Pool
from sharded_milter.pool.shard import Shard
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.wire import PAYLOAD
from sharded_milter.transports import PassingTransport

MANIFEST = Manifest("fuzzed")
READY = {
    "name": b"fuzzed",
    "negotiation": MANIFEST.to_packet()[PAYLOAD:],
    "light": b"",
    "shard_by": b"",
    "affinity": b"none",
}


class Reactor(Clock):
    """A clock and real sockets, one turn at a time; it knows how long the longest turn was."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()
        self.longest = 0.0
        self.addReader, self.removeReader = self.readers.add, self.readers.discard
        self.addWriter, self.removeWriter = self.writers.add, self.writers.discard

    def run(self, turns: int = 10_000) -> None:
        """Turns until there is nothing to do now."""
        for _ in range(turns):
            ready = self._ready()
            due = [call for call in self.getDelayedCalls() if call.getTime() <= self.seconds()]
            if not ready and not due:
                return
            acts: list[Callable[[], Any]] = [*ready, partial(self.advance, 0)]
            for act in acts:
                began = time.thread_time()  # the machine may have other things to do besides
                act()
                self.longest = max(self.longest, time.thread_time() - began)
        raise AssertionError("it never comes to rest")

    def _ready(self) -> list[Callable[[], None]]:
        poll = select.poll()
        known = {each.fileno(): each for each in self.readers | self.writers}
        for fd, each in known.items():
            reads = select.POLLIN if each in self.readers else 0
            poll.register(fd, reads | (select.POLLOUT if each in self.writers else 0))
        return [
            lambda each=known[fd], what=what: self._serve(each, what)  # type: ignore[misc]
            for fd, what in poll.poll(0)
        ]

    def _serve(self, transport: Any, what: int) -> None:
        why = None
        if what & (select.POLLIN | select.POLLHUP) and transport in self.readers:
            why = transport.doRead()
        if why is None and what & select.POLLOUT and transport in self.writers:
            why = transport.doWrite()
        if why is not None:
            self.readers.discard(transport)
            self.writers.discard(transport)
            transport.connectionLost(Failure(why))


class Liar:
    """The place of one shard. It knows what its worker was asked, and whether it has lied."""

    def __init__(self, pid: int, reactor: Reactor) -> None:
        self.pid = pid
        self.has_lied = False
        self.is_ready = False
        self.killed = False
        self.alive = False
        self.asked: list[tuple[bytes, bytes]] = []  # tags, and the first words of messages
        self._reactor = reactor
        self._unread = b""
        self._memory: dict[int, bytes] = {}  # what memory begins with, by inode

    def start(self, owner: Any, channel: Any) -> None:
        """As a place does."""
        ours, self.socket = socket.socketpair()
        self.socket.setblocking(False)
        self.owner, self.channel, self.alive = owner, channel, True
        PassingTransport.connect(ours, channel, self._reactor)

    def read_output(self) -> None:
        """It writes nothing."""

    def kill(self) -> None:
        """The process says nothing more; its exit follows."""
        self.killed = True

    def dump_stacks(self) -> None:
        """It has none."""

    def is_stopped(self) -> bool:
        """No signal stops it."""
        return False

    def is_traced(self) -> bool:
        """No debugger holds it."""
        return False

    def memory(self) -> int:
        """It needs none."""
        return 0

    def kill_descendants(self) -> None:
        """It has none."""

    # What the worker does

    def exit(self) -> None:
        """The process is reaped."""
        if self.alive:
            self.alive = False
            self.socket.close()
            self.owner.exited("killed by SIGKILL")

    def send(self, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """As much as the socket takes, the descriptors with the first byte; closes those."""
        with suppress(OSError):  # it is full, or closed
            if self.alive and not self.killed:
                while data:
                    numbers = array.array("i", descriptors)
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
                    data = data[self.socket.sendmsg([data], rights) :]
                    self._reactor.run()
                    for fd in descriptors:
                        os.close(fd)
                    descriptors = ()
        for fd in descriptors:
            os.close(fd)

    def read(self) -> None:
        """Takes what the master has said, and lets go of what has come with it."""
        with suppress(OSError):
            while self.alive:
                data, descriptors, _, _ = socket.recv_fds(self.socket, 65_536, 99)
                for fd in descriptors:
                    self._memory[os.fstat(fd).st_ino] = os.pread(fd, 20, 0)
                    os.close(fd)
                if not data:
                    break
                self._unread += data
                self._reactor.run()
        box: dict[bytes, bytes] = {}
        at = 0
        for key, value, end in _pairs(self._unread):
            if key:
                box[key] = value
                continue
            if box.get(amp.COMMAND) == b"Ask":
                part = box[b"message"]
                message = part[1:] if part[:1] == b"=" else self._memory[int(part[1:].split()[0])]
                self.asked.append((box[amp.ASK], message[PAYLOAD:].split()[0]))
            box, at = {}, end
        self._unread = self._unread[at:]

    def be_ready(self) -> None:
        """It says that it is ready, as it should."""
        self.is_ready = True
        values: dict[str, Any] = {"milters": [READY], "code": b"code", "socket": b""}
        box = Ready.makeArguments(values, None)
        box[amp.COMMAND] = Ready.commandName
        self.send(box.serialize())


def _pairs(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Keys, values, and where they end; no key where a box does."""
    at = 0
    while at + 2 <= len(data):
        start = at + 2
        middle = start + int.from_bytes(data[at:start], "big")
        if middle == start:
            yield b"", b"", start
            at = start
            continue
        end = middle + 2 + int.from_bytes(data[middle : middle + 2], "big")
        if end > len(data) or middle + 2 > len(data):
            return
        yield data[start:middle], data[middle + 2 : end], end
        at = end


class Master:
    """The real dispatcher, pool, shards and channels, with liars for workers."""

    def __init__(self, size: int, **limits: Any) -> None:
        self.reactor = Reactor()
        self.limits = Limits(**limits)
        self.dispatcher = Dispatcher(self.limits, self.reactor)
        self.liars: list[Liar] = []
        self.pool = Pool(self._shard, size, self.limits, self.dispatcher, self.reactor)
        self.pool.start().addErrback(lambda _: None)

    def _shard(self, slot: int, pool: Pool) -> Shard:
        liar = Liar(1000 + len(self.liars), self.reactor)
        self.liars.append(liar)
        return Shard(slot, liar, self.dispatcher, pool, self.reactor)

    @property
    def alive(self) -> list[Liar]:
        """Those whose processes are not reaped."""
        return [liar for liar in self.liars if liar.alive]
