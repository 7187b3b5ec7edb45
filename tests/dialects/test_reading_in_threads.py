"""Threads that use a value for the first time each see all of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event, current_thread, main_thread
from typing import Any

import pytest

from sharded_milter.dialects import transcript
from sharded_milter.protocol import commands
from sharded_milter.protocol.packets import Packet

SOON = 10  # seconds

CONNECTION = (
    commands.Macro("C", (("j", "mx"), ("{daemon_name}", "smtpd"))),
    commands.Macro("H", (("i", "old"),)),
)
MESSAGE = (
    commands.Macro("M", (("i", "4F1"),)),
    commands.Header("Subject", "hi"),
    commands.Header("To", "you"),
    commands.Header("Subject", "again"),
)


def packed(packets: tuple[Packet, ...]) -> bytes:
    return b"".join(packet.encode() for packet in packets)


def reading() -> transcript.ParsedTranscript:
    transcript._read_connection.cache_clear()  # its client may have been looked at
    return transcript.read(packed(CONNECTION), packed(MESSAGE))


def seen_by_two(
    monkeypatch: pytest.MonkeyPatch, where: object, decoder: str, look: Callable[[], Any]
) -> tuple[Any, Any]:
    """Return what two threads read; the second begins while the first decodes."""
    half_way, go_on = Event(), Event()
    decode, calls = getattr(where, decoder), count()

    def halting(payload: bytes) -> Any:
        if current_thread() is not main_thread() and next(calls) == 1:
            half_way.set()
            assert go_on.wait(SOON)
        return decode(payload)

    monkeypatch.setattr(where, decoder, halting)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(look)
        try:
            assert half_way.wait(SOON)
            second = look()
        finally:
            go_on.set()
        return first.result(SOON), second


LOOKS: dict[str, Callable[[Any], Any]] = {
    "iterate": list,
    "len": len,
    "look up": lambda value: (value["subject"], value.get_all("subject")),
    "repr": repr,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_two_threads_see_all_header_fields(
    look: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = reading().headers_value()
    first, second = seen_by_two(monkeypatch, transcript, "split_strings", lambda: look(headers))
    assert first == second == look(reading().headers_value())


@pytest.mark.parametrize("look", [list, len, repr, dict, lambda macros: macros["{j}"]])
@pytest.mark.parametrize("part", ["client", "envelope"])
def test_two_threads_see_all_macros(
    part: str, look: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def macros() -> Any:
        read = reading()
        value = read.connection_value() if part == "client" else read.envelope_value()
        return value.macros

    shared = macros()
    first, second = seen_by_two(monkeypatch, commands.Macro, "parse", lambda: look(shared))
    assert first == second == look(macros())


def test_two_threads_see_the_same_bytes_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    message = reading().message_value()
    first, second = seen_by_two(monkeypatch, transcript, "split_strings", lambda: bytes(message))
    assert first == second == b"Subject: hi\r\nTo: you\r\nSubject: again\r\n\r\n"


def test_what_cannot_be_decoded_is_refused_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    macros = reading().envelope_value().macros

    def broken(payload: bytes) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(commands.Macro, "parse", broken)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            len(macros)
