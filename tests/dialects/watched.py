"""A milter that is an object and records its callbacks; and packets for its jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from typing import Any

from sharded_milter.dialects.libmilter.classes import Milter
from sharded_milter.dialects.libmilter.context import ReturnCodes
from sharded_milter.dialects.loader import as_dialect
from sharded_milter.protocol import commands
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Protocol, Stage

CALLBACKS = {
    Stage.CONNECT: "xxfi_connect",
    Stage.HELO: "xxfi_helo",
    Stage.MAIL: "xxfi_envfrom",
    Stage.RCPT: "xxfi_envrcpt",
    Stage.DATA: "xxfi_data",
    Stage.HEADER: "xxfi_header",
    Stage.EOH: "xxfi_eoh",
    Stage.BODY: "xxfi_body",
    Stage.EOM: "xxfi_eom",
    Stage.UNKNOWN: "xxfi_unknown",
}
ENDS = ("xxfi_abort", "xxfi_close")
EVERY_CALLBACK = (*CALLBACKS.values(), *ENDS)

# A packet of each stage.
PACKETS: dict[Stage, Packet] = {
    Stage.CONNECT: commands.Connect("client.example", "4", 25, "192.0.2.1"),
    Stage.HELO: commands.Helo("client"),
    Stage.MAIL: commands.Mail("<a@example.org>", ("SIZE=9",)),
    Stage.RCPT: commands.Rcpt("<b@example.net>", ("NOTIFY=NEVER",)),
    Stage.DATA: commands.Data(),
    Stage.HEADER: commands.Header("Subject", " hi"),
    Stage.EOH: commands.Eoh(),
    Stage.BODY: commands.Body(b"one\r\n"),
    Stage.EOM: commands.Eom(),
    Stage.UNKNOWN: commands.Unknown("XYZZY 1"),
}

ALL_ACTIONS = 0x1FF
ALL_PROTOCOL = 0x1FFFFF


def agreed(
    actions: int = ALL_ACTIONS, protocol: int = Protocol.HDR_LEADSPC, offered: int = ALL_PROTOCOL
) -> list[Packet]:
    """Return the packets of a negotiation: the MTA's offer and the reply."""
    return [
        commands.Negotiate(6, ALL_ACTIONS, offered),
        commands.Negotiate(6, actions, int(protocol)),
    ]


def packed(packets: Iterable[Packet]) -> bytes:
    return b"".join(packet.encode() for packet in packets)


class Turn:
    """An awaitable that suspends its coroutine once."""

    def __await__(self) -> Generator[None, None, None]:
        yield


def awaited(answer: bytes | Awaitable[bytes]) -> bytes:
    """Return the answer; everything that it awaits gives None."""
    if isinstance(answer, bytes):
        return answer
    steps = answer.__await__()
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        result: bytes = stop.value
        return result


Answers = Mapping[str, Any]


class Watched:
    """A class of milters and its dialect; `calls` are the callbacks that were called.

    `answers` are by the name of the callback: a value, or a function that gets the object and
    returns one. `coroutines` makes every callback a coroutine that waits, and notes when it goes
    on.
    """

    def __init__(
        self,
        answers: Answers | None = None,
        *,
        callbacks: Iterable[str] = EVERY_CALLBACK,
        coroutines: bool = False,
        **attributes: Any,
    ) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._answers = answers or {}
        make = self._coroutine if coroutines else self._method
        names = dict.fromkeys([*callbacks, *self._answers])
        methods = {name: make(name) for name in names}
        self.milter: Any = type("Watched", (Milter,), {**methods, **attributes})
        self.dialect = as_dialect(self.milter)
        self.calls.clear()

    def _method(self, name: str) -> Callable[..., Any]:
        def callback(milter: Any, *arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return self._answer(name, milter)

        return callback

    def _coroutine(self, name: str) -> Callable[..., Any]:
        async def callback(milter: Any, *arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            await Turn()
            self.calls.append((name, "goes on"))
            return self._answer(name, milter)

        return callback

    def _answer(self, name: str, milter: Any) -> Any:
        answer = self._answers.get(name, ReturnCodes.CONTINUE)
        return answer(milter) if callable(answer) else answer

    def ask(self, *packets: Packet, session: int = 1) -> bytes:
        """Return the answer to the last of the packets."""
        return awaited(self.dialect.answer(Stage.EOM, b"", packed(packets), session))

    def close(self, session: int = 1) -> bytes:
        """End the connection."""
        return awaited(self.dialect.answer(None, b"", b"", session))

    @property
    def names(self) -> list[str]:
        """Return the names of the callbacks that were called."""
        return [name for name, *_ in self.calls]
