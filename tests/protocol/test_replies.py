"""The SMTP reply text: always one that both MTAs pass on to the client."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.errors import LocalProtocolError
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.replies import (
    MAX_REPLY_LINE,
    MAX_REPLY_LINES,
    ReplyCode,
    reply_text,
)
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.text import to_text, to_wire

from .strategies import agreement, packet, texts

NOTHING_SPECIAL = agreement()


def shown(text: str) -> list[bytes]:
    """The lines that the SMTP client sees: an MTA turns `%%` into `%`."""
    return to_wire(text).replace(b"%%", b"%").split(b"\r\n")


def sendable(payload: bytes) -> bool:
    try:
        check_replies(Stage.MAIL, packet("y", payload), NOTHING_SPECIAL)
    except LocalProtocolError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no thanks", "550 5.7.1 no thanks"),
        ("100% sure, %s", "550 5.7.1 100%% sure, %%s"),
        ("", "550 5.7.1"),
        ("   ", "550 5.7.1"),
        ("first\nsecond\nlast", "550-5.7.1 first\r\n550-5.7.1 second\r\n550 5.7.1 last"),
        ("first\r\nlast\r\n", "550-5.7.1 first\r\n550 5.7.1 last"),
        ("a\rb", "550-5.7.1 a\r\n550 5.7.1 b"),
        ("a\n\nb", "550-5.7.1 a\r\n550-5.7.1\r\n550 5.7.1 b"),
        ("a\0b\x1b[31m\x7fc", "550 5.7.1 a b [31m c"),
        ("tab\tstays", "550 5.7.1 tab\tstays"),
        ("Grüße 😀", "550 5.7.1 Grüße 😀"),
        ("2 errors", "550 5.7.1 2 errors"),
    ],
)
def test_a_text_becomes_a_reply(text: str, expected: str) -> None:
    assert reply_text(550, "5.7.1", text) == expected


@pytest.mark.parametrize(("code", "expected"), [(451, "451 4.0.0 no"), (550, "550 5.0.0 no")])
def test_a_missing_enhanced_code_is_supplied(code: int, expected: str) -> None:
    assert reply_text(code, "", "no") == expected


def test_long_lines_are_wrapped_at_a_space() -> None:
    text = "word " * 300
    lines = shown(reply_text(550, "5.7.1", text))
    assert [line[:10] for line in lines] == [b"550-5.7.1 "] * (len(lines) - 1) + [b"550 5.7.1 "]
    assert all(len(line) <= MAX_REPLY_LINE for line in lines)
    assert b" ".join(line[10:] for line in lines).decode() == text.strip()
    assert len(lines) == 4


@pytest.mark.parametrize("character", ["a", "é", "€", "😀", to_text(b"\xff"), to_text(b"\x80")])
@pytest.mark.parametrize("shift", range(5))
def test_a_line_without_a_space_is_cut_between_characters(character: str, shift: int) -> None:
    text = "x" * shift + character * 600
    lines = shown(reply_text(550, "5.7.1", text))
    assert b"".join(line[10:] for line in lines) == to_wire(text)
    assert all(MAX_REPLY_LINE - 4 < len(line) <= MAX_REPLY_LINE for line in lines[:-1])
    whole = text.isascii() or "\udc80" <= character <= "\udcff"
    assert whole or all(line.decode() for line in lines)


def test_doubled_percent_signs_do_not_count() -> None:
    assert len(reply_text(550, "5.7.1", "%" * (MAX_REPLY_LINE - 10)).splitlines()) == 1


def test_at_most_32_lines_are_kept() -> None:
    assert MAX_REPLY_LINES == 32
    lines = reply_text(550, "5.7.1", "\n".join(map(str, range(100)))).split("\r\n")
    assert lines[-2:] == ["550-5.7.1 30", "550 5.7.1 31"]
    assert len(lines) == 32


def test_the_line_limit_leaves_room_for_an_address_within_smtps_512() -> None:
    assert MAX_REPLY_LINE == 480


CODES = st.one_of(
    st.tuples(st.integers(400, 499), st.sampled_from(["4.7.1", "4.123.456", ""])),
    st.tuples(st.integers(500, 599), st.sampled_from(["5.7.1", "5.0.999", ""])),
)


@given(CODES, st.one_of(st.text(), texts, st.binary(max_size=3000).map(to_text)))
def test_every_reply_is_well_formed(codes: tuple[int, str], text: str) -> None:
    code, xcode = codes
    made = reply_text(code, xcode, text)
    raw = ReplyCode(made).encode()
    assert check_replies(Stage.RCPT, raw, NOTHING_SPECIAL) == ord("y")
    lines = shown(made)
    assert 1 <= len(lines) <= 32
    assert all(len(line) <= MAX_REPLY_LINE for line in lines)
    begins = [re.match(rb"(\d{3})([- ])(\d\.\d+\.\d+)( |$)", line) for line in lines]
    assert {match and int(match[1]) for match in begins} == {code}
    assert {match and match[3].decode() for match in begins} == {xcode or f"{code // 100}.0.0"}
    separators = "".join(match[2].decode() if match else "" for match in begins)
    assert separators == "-" * (len(lines) - 1) + " "
    assert not made.replace("%%", "").count("%")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", made)


@given(st.text("ab é€😀\udcff%", max_size=3000))
def test_no_character_of_a_line_is_lost(text: str) -> None:
    lines = shown(reply_text(550, "5.7.1", text))
    made = b"".join(line[10:] for line in lines)
    assert made.replace(b" ", b"") == to_wire(text).replace(b" ", b"")


# What a worker may hand to the MTA as a reply of its own making


@pytest.mark.parametrize(
    "payload",
    [
        b"550 5.7.1 no\0",
        b"550 no\0",
        b"550 \0",
        b"421 4.7.0 go away\0",
        b"450-4.7.1 one\r\n450 4.7.1 two\0",
        b"550 5.7.1 100%% sure\0",
        b"550 5.7.1 \xff\xfe\0",
        b"550 5.7.1\0",
        b"550 5.777.777 " + b"x" * 980 + b"\0",
        b"550-x\r\n" * 31 + b"550 x\0",
    ],
)
def test_a_well_formed_reply_is_sent(payload: bytes) -> None:
    assert sendable(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"550 5.7.1 no",  # what stands behind in the MTA's memory would be shown to the client
        b"",
        b"\0",
        b"550\0",
        b"no\0",
        b"250 2.0.0 ok\0",
        b"354 go\0",
        b"650 no\0",
        b"55 no\0",
        b"550-5.7.1 no\0",
        b"550_5.7.1 no\0",
        b"550 2 errors\0",
        b"550 4.7.1 no\0",
        b"550 5.7.1 100% sure\0",
        b"550 5.7.1 %%%\0",
        b"550 5.7.1 no\r\n\0",
        b"550 5.7.1 no\n\0",
        b"550 5.7.1 a\rb\0",
        b"550-5.7.1 a\n550 5.7.1 b\0",
        b"550 5.7.1 a\r\n550 5.7.1 b\0",
        b"550-5.7.1 a\r\n550-5.7.1 b\0",
        b"550-5.7.1 a\r\n551 5.7.1 b\0",
        b"550-5.7.1 a\r\n450 4.7.1 b\0",
        b"550-5.7.1 a\r\n550 4.7.1 b\0",
        b"550 5.7.1 a\0b\0",
        b"550 5.777.777 " + b"x" * 981 + b"\0",
        b"550-x\r\n" * 32 + b"550 x\0",
    ],
)
def test_a_malformed_reply_is_not_sent(payload: bytes) -> None:
    assert not sendable(payload)
