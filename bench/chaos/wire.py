"""One connection to a milter: packets in, and bytes out in pieces of random size.

The framing is its own, so that a mistake in ours is no mistake in the check too.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct

from bench.chaos.answers import Answer, Wrong
from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import LEGAL, Progress, parse_reply

# So many bytes are never kept back to be written with what follows.
JOINED = 20_000


class Closed(Exception):
    """The milter has closed the connection while an answer was due."""


class Wire(asyncio.Protocol):
    """A connection; any packet is waited for `timeout` seconds, `rnd` makes the pieces."""

    def __init__(self, rnd: random.Random, timeout: float) -> None:
        self.received = bytearray()
        self.closed = False
        self.progress = 0  # packets that said only that an answer is coming
        self._random = rnd
        self._timeout = timeout
        self._unsent = bytearray()
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, target: str, rnd: random.Random, timeout: float) -> Wire:
        """A connection to a path or to HOST:PORT."""
        loop = asyncio.get_running_loop()
        if target.startswith("/"):
            _, wire = await loop.create_unix_connection(lambda: cls(rnd, timeout), target)
        else:
            host, _, port = target.rpartition(":")
            _, wire = await loop.create_connection(lambda: cls(rnd, timeout), host, int(port))
        return wire

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._news.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # Out

    async def send(self, data: bytes, *, now: bool = False) -> None:
        """Writes what waits and `data`, or, unless it must be `now`, a part of it later."""
        rnd = self._random
        self._unsent += data
        if not now and len(self._unsent) < JOINED and rnd.random() < 0.7:
            return
        while self._unsent and (now or rnd.random() < 0.9):
            size = self._piece()
            self.transport.write(bytes(self._unsent[:size]))
            del self._unsent[:size]
            if rnd.random() < 0.3:
                await asyncio.sleep(0)
        await self._writable.wait()

    def _piece(self) -> int:
        how = self._random.random()
        if how < 0.6:
            return len(self._unsent)
        return self._random.randint(1, 9 if how < 0.75 else 3_000)

    # In

    async def answer(self) -> Answer:
        """The next final reply, with the changes before it.

        Raises Closed, TimeoutError, or Wrong for what is no reply.
        """
        await self.send(b"", now=True)
        changes = list[Packet]()
        while True:
            packet = await self.packet()
            try:
                reply = parse_reply(packet)
            except RemoteProtocolError as error:
                raise Wrong(f"got what is no reply: {error}") from None
            if LEGAL[packet[4]].final:
                return Answer(reply, changes)
            if isinstance(reply, Progress):
                self.progress += 1
            else:
                changes.append(reply)

    async def packet(self) -> bytes:
        """The next packet, whole."""
        async with asyncio.timeout(self._timeout):
            while len(self.received) < 4 or len(self.received) < (end := self._end()):
                if self.closed:
                    raise Closed(f"the milter has closed; {bytes(self.received[:80])!r} was there")
                self._news.clear()
                await self._news.wait()
        found = bytes(self.received[:end])
        del self.received[:end]
        return found

    def _end(self) -> int:
        return 4 + int(struct.unpack_from(">I", self.received)[0])

    def check_silence(self) -> None:
        """Raises Wrong when something was said that nobody has asked for."""
        if self.received:
            raise Wrong(f"was told what nobody had asked: {bytes(self.received[:100])!r}")

    # The end

    async def wait_closed(self) -> None:
        """Returns when the milter has closed; raises TimeoutError when it does not."""
        async with asyncio.timeout(self._timeout):
            while not self.closed:
                self._news.clear()
                await self._news.wait()

    def close(self) -> None:
        """Leaves without a word."""
        self.transport.close()

    def reset(self) -> None:
        """Leaves so that the milter is told of an error, over TCP."""
        sock = self.transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    @property
    def transport(self) -> asyncio.Transport:
        """What asyncio writes with."""
        assert self._transport is not None
        return self._transport
