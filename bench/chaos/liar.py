"""A proxy that mixes the answers of a milter on their way, to show that the check notices it.

It stands between the MTAs and the milter, forwards what MTAs say and looks at each answer: a final
reply with the changes before it. A lie is done to every EVERY-th answer that it fits.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sharded_milter.protocol.replies import LEGAL
from sharded_milter.protocol.wire import LETTER, Framer

EVERY = 20

# How long an answer is kept for one to exchange it with, and how long a verdict is kept back so
# that an MTA may drop its message meanwhile, in seconds.
PARTNER, KEPT_BACK = 0.5, 0.015

_READ = 65_536

Packets = list[bytes]


@dataclass
class _Link:
    """One connection through the proxy."""

    aborts: int = 0  # that the MTA has sent
    stale: Packets = field(default_factory=list)  # the answer to a message that was dropped


class Liar:
    """Tells one lie, over and over."""

    def __init__(self, lie: str) -> None:
        self._lie = LIES[lie]
        self.told = 0
        self._count = itertools.count(1)
        self._waiting: tuple[_Link, Packets, asyncio.Future[Packets]] | None = None

    async def answer(self, link: _Link, packets: Packets) -> Packets:
        """What the MTA gets in the place of an answer."""
        return await self._lie(self, link, packets)

    def due(self) -> bool:
        """Whether it is time for a lie."""
        return next(self._count) % EVERY == 0

    async def partner(self, link: _Link, packets: Packets) -> Packets:
        """The answer of another connection, where there is one soon; else its own."""
        if self._waiting is not None and self._waiting[0] is not link:
            _, other, future = self._waiting
            self._waiting = None
            if not future.done():
                future.set_result(packets)
                self.told += 1
                return other
        if self._waiting is not None or not self.due():
            return packets
        future = asyncio.get_running_loop().create_future()
        self._waiting = (link, packets, future)
        try:
            return await asyncio.wait_for(future, PARTNER)
        except TimeoutError:
            self._waiting = None
            return packets


def _letters(packets: Packets) -> str:
    return "".join(chr(packet[LETTER]) for packet in packets)


def _is_verdict(packets: Packets) -> bool:
    """Whether it is the answer to a whole message that was accepted."""
    return "i" in _letters(packets) or "h" in _letters(packets)


async def _swapped(liar: Liar, link: _Link, packets: Packets) -> Packets:
    """Two messages get each other's answer."""
    return await liar.partner(link, packets) if _is_verdict(packets) else packets


async def _swapped_action(liar: Liar, link: _Link, packets: Packets) -> Packets:
    """Two messages get each other's header field, but their own rest."""
    return await _exchanged(liar, link, packets, "ih")


async def _swapped_body(liar: Liar, link: _Link, packets: Packets) -> Packets:
    """Two messages get each other's new body."""
    return await _exchanged(liar, link, packets, "b")


async def _exchanged(liar: Liar, link: _Link, packets: Packets, letters: str) -> Packets:
    chosen = [packet for packet in packets if chr(packet[LETTER]) in letters]
    if not chosen:
        return packets
    rest = [packet for packet in packets if chr(packet[LETTER]) not in letters]
    return [*await liar.partner(link, chosen), *rest]


async def _swapped_recipient(liar: Liar, link: _Link, packets: Packets) -> Packets:
    """A refusal reaches another MTA, in whose place it gets CONTINUE or another refusal."""
    return await liar.partner(link, packets) if _letters(packets) == "y" else packets


async def _lost(liar: Liar, link: _Link, packets: Packets) -> Packets:
    """An MTA waits in vain."""
    if not _is_verdict(packets) or not liar.due():
        return packets
    liar.told += 1
    return []


async def _twice(liar: Liar, link: _Link, packets: Packets) -> Packets:
    """An MTA gets its answer, and once more."""
    if not _is_verdict(packets) or not liar.due():
        return packets
    liar.told += 1
    return packets * 2


async def _late(liar: Liar, link: _Link, packets: Packets) -> Packets:
    """What was under way to a message that was dropped answers the next one."""
    if not _is_verdict(packets):
        return packets
    if link.stale:
        stale, link.stale = link.stale, []
        liar.told += 1
        return stale
    before = link.aborts
    await asyncio.sleep(KEPT_BACK)
    if link.aborts > before:
        link.stale = packets
        return []
    return packets


LIES: dict[str, Callable[[Liar, _Link, Packets], Awaitable[Packets]]] = {
    "swapped": _swapped,
    "swapped-action": _swapped_action,
    "swapped-body": _swapped_body,
    "swapped-recipient": _swapped_recipient,
    "lost": _lost,
    "twice": _twice,
    "late": _late,
}


@asynccontextmanager
async def lying(target: str, lie: str) -> AsyncIterator[str]:
    """Where MTAs are to connect for answers that were mixed; without a lie, the target itself."""
    if not lie:
        yield target
        return
    liar = Liar(lie)
    serving = set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await _forward(target, liar, _Link(), reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # one of both has left, or all is over
        finally:
            serving.discard(task)
            writer.close()

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        path = str(Path(folder, "s"))
        server = await asyncio.start_unix_server(serve, path)
        try:
            yield path
        finally:
            server.close()
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving)


async def _forward(
    target: str,
    liar: Liar,
    link: _Link,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    if target.startswith("/"):
        answers, commands = await asyncio.open_unix_connection(target)
    else:
        host, _, port = target.rpartition(":")
        answers, commands = await asyncio.open_connection(host, int(port))
    up = asyncio.create_task(_up(link, reader, commands))
    try:
        await _down(liar, link, answers, writer)
    finally:
        up.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await up
        commands.close()


async def _up(link: _Link, reader: asyncio.StreamReader, commands: asyncio.StreamWriter) -> None:
    framer = Framer()
    while data := await reader.read(_READ):
        link.aborts += _letters(framer.receive(data)).count("A")
        commands.write(data)
        await commands.drain()
    commands.close()


async def _down(
    liar: Liar, link: _Link, answers: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    framer, answer = Framer(), Packets()
    while data := await answers.read(_READ):
        for packet in framer.receive(data):
            answer.append(packet)
            letter = packet[LETTER]
            if letter not in LEGAL or LEGAL[letter].final:
                writer.write(b"".join(await liar.answer(link, answer)))
                answer = []
        await writer.drain()
