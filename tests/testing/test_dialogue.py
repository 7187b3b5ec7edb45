"""A message becomes the commands that Postfix sends for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.protocol import commands
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import NO_PROTOCOL, Protocol
from sharded_milter.protocol.wire import MAX_CHUNK
from sharded_milter.testing.dialogue import (
    FIELD_LIMIT,
    Mail,
    content,
    envelope,
    exchanges,
    greeting,
    split,
    transaction,
    wanted,
)
from sharded_milter.testing.generated import BODY_BYTES, HEADERS, generated


@pytest.mark.parametrize(
    ("raw", "fields", "body"),
    [
        (b"A: b\r\nC:d\r\n\r\nbody\r\n", [b"A: b", b"C:d"], b"body\r\n"),
        (b"A: b\r\n c\r\n\td\r\n\r\n", [b"A: b\n c\n\td"], b""),
        (b"A: b\r\n\r\n\r\nx", [b"A: b"], b"\r\nx"),
        (b"A: b", [b"A: b"], b""),
        (b"A : b\r\n", [b"A : b"], b""),
        (b"\r\nbody", [], b"body"),
        (b" indented\r\n", [], b" indented\r\n"),
        (b"A: b\r\nno field\r\nC: d", [b"A: b"], b"no field\r\nC: d"),
        (b"", [], b""),
    ],
)
def test_what_is_no_header_begins_the_body(raw: bytes, fields: list[bytes], body: bytes) -> None:
    assert split(raw) == (fields, body)


@given(st.lists(st.sampled_from([b"A: b", b" c", b"", b"no", b"\r", b"\n", b"\0:"])))
def test_nothing_is_lost(lines: list[bytes]) -> None:
    raw = b"\r\n".join(lines)
    fields, body = split(raw)
    header = b"".join(field.replace(b"\n", b"\r\n") + b"\r\n" for field in fields)
    assert raw in (header + body, header + b"\r\n" + body, header.removesuffix(b"\r\n"))


def headers(packets: list[Packet]) -> list[tuple[str, str]]:
    return [(p.name, p.value) for p in packets if isinstance(p, commands.Header)]


def test_a_field_keeps_its_bytes_but_what_no_mta_would_pass_on() -> None:
    said = content(Mail(b"A:  caf\xe9\0\r\nLong: " + b"x" * FIELD_LIMIT + b"\r\n\r\n"))
    assert headers(said)[0] == ("A", "  caf\udce9")
    assert len(headers(said)[1][1]) == FIELD_LIMIT - len("Long:")


def test_the_body_comes_in_chunks() -> None:
    said = content(Mail(b"\r\n" + bytes(MAX_CHUNK + 1)))
    assert [len(p.chunk) for p in said if isinstance(p, commands.Body)] == [MAX_CHUNK, 1]


def test_the_envelope_names_everybody() -> None:
    said = envelope(Mail(b"12345", "", ["a@b", "c@d"]))
    assert said[0] == commands.Macro("M", (("{mail_addr}", ""),))
    assert said[1] == commands.Mail("<>", ("SIZE=5",))
    assert said[3::2] == [commands.Rcpt("<a@b>"), commands.Rcpt("<c@d>")]


def test_the_space_before_a_value_is_sent_where_it_was_asked_for() -> None:
    said = [commands.Header("A", "  b")]
    assert headers(list(wanted(said, NO_PROTOCOL))) == [("A", " b")]
    assert headers(list(wanted(said, Protocol.HDR_LEADSPC))) == [("A", "  b")]


def test_groups_end_with_what_is_answered() -> None:
    groups, rest = exchanges(transaction(generated()), Protocol.NR_HEADER | Protocol.NO_BODY)
    assert [chr(group[-1][4]) for group in groups] == ["M", "R", "T", "N", "E"]
    assert rest == []
    alone, rest = exchanges(greeting(), Protocol.NR_CONNECT | Protocol.NR_HELO)
    assert (alone, len(rest)) == ([], 3)


def test_every_run_sends_the_same_bytes_and_every_number_others() -> None:
    assert generated(1) == generated(1)
    assert (
        len({generated(n).raw for n in range(9)} | {generated(n).queue_id for n in range(9)}) == 18
    )
    assert len(headers(content(generated()))) == HEADERS
    for size in (0, 1, BODY_BYTES, 100_001):
        assert len(split(generated(body=size).raw)[1]) == size
    assert headers(content(generated(headers=2))) == [
        ("From", " A <a@example.org>"),
        ("To", " B <b@example.com>"),
    ]
