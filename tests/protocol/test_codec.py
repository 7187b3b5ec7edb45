"""Bytes to values and back: nothing is lost, and nothing but a protocol error comes of garbage."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol.commands import (
    COMMANDS,
    Abort,
    Body,
    Connect,
    Data,
    Eoh,
    Eom,
    Header,
    Helo,
    Macro,
    Mail,
    Negotiate,
    Quit,
    Rcpt,
    check_command,
    parse_command,
)
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import (
    LEGAL,
    REPLIES,
    AddHeader,
    AddRecipient,
    AddRecipientPar,
    ChangeHeader,
    ChangeSender,
    Continue,
    DeleteRecipient,
    InsertHeader,
    Progress,
    Quarantine,
    ReplaceBody,
    ReplyCode,
    parse_reply,
)
from sharded_milter.protocol.text import (
    MAX_SHOWN,
    join_strings,
    printable,
    quoted,
    split_strings,
    to_text,
    to_wire,
)
from sharded_milter.protocol.wire import (
    MAX_CHUNK,
    MAX_PACKET,
    Framer,
    checked_length,
    frame,
    packets,
)

from .strategies import commands_, encoded, packet, payloads, replies_, sliced, texts

# Text


def test_what_is_printable_is_shown_as_it_is() -> None:
    text = "caf\u00e9 \u0645\u0631 \\ \"'="
    assert printable(text) == text


def test_what_is_not_printable_is_shown_by_its_number() -> None:
    assert printable("a\t\r\n\x1b\x7f\x9b\u2028\u202e\udcff\ud800\U000e0001b") == (
        r"a\t\r\n\x1b\x7f\x9b\u2028\u202e\xff\ud800\U000e0001b"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("4F3A2B1C0D", "4F3A2B1C0D"),
        ("1tYJ5X-0000Xy-2B", "1tYJ5X-0000Xy-2B"),
        ("C size=1 verdict=reject", r'"C\x20size\x3d1\x20verdict\x3dreject"'),
        ('a" b="c', r'"a\x22\x20b\x3d\x22c"'),
        ("a\nb", r'"a\nb"'),
        ("a\x1b]", r'"a\x1b\x5d"'),
        ("a\\x20b", r'"a\x5cx20b"'),
        ("x" * (MAX_SHOWN + 1), "x" * MAX_SHOWN + "..."),
    ],
)
def test_a_value_cannot_be_taken_for_another_field(value: str, shown: str) -> None:
    assert quoted(value) == shown


@given(st.binary())
def test_any_bytes_survive_as_text(raw: bytes) -> None:
    assert to_wire(to_text(raw)) == raw


@given(st.lists(texts).map(tuple))
def test_strings_survive_joining_and_splitting(strings: tuple[str, ...]) -> None:
    assert tuple(split_strings(join_strings(strings))) == strings


@pytest.mark.parametrize(
    ("payload", "strings"),
    [(b"", []), (b"\0", [""]), (b"a\0", ["a"]), (b"a\0\0", ["a", ""]), (b"\xff\0", ["\udcff"])],
)
def test_every_string_has_its_nul(payload: bytes, strings: list[str]) -> None:
    assert split_strings(payload) == strings


def test_a_string_without_its_nul_is_an_error() -> None:
    with pytest.raises(RemoteProtocolError, match="without its final NUL"):
        split_strings(b"a\0b")


# Values


def known(table: dict[int, type[Packet]]) -> st.SearchStrategy[str]:
    return st.sampled_from([chr(code) for code in table])


@given(commands_)
def test_a_command_survives_the_wire(command: Packet) -> None:
    raw = command.encode()
    check_command(raw)
    assert parse_command(raw) == command
    assert raw == packet(chr(command.letter[0]), command.payload())


@given(replies_)
def test_a_reply_survives_the_wire(reply: Packet) -> None:
    assert parse_reply(reply.encode()) == reply


@given(known(COMMANDS), payloads)
def test_what_can_be_read_as_a_command_is_written_back_the_same(letter: str, data: bytes) -> None:
    raw = packet(letter, data)
    try:
        command = parse_command(raw)
    except RemoteProtocolError:
        return
    assert command.encode() == raw


@given(known(REPLIES), payloads)
def test_what_can_be_read_as_a_reply_is_written_back_the_same(letter: str, data: bytes) -> None:
    raw = packet(letter, data)
    try:
        reply = parse_reply(raw)
    except RemoteProtocolError:
        return
    assert reply.encode() == raw


@given(known(COMMANDS), payloads)
def test_a_command_is_found_malformed_exactly_where_reading_it_fails(
    letter: str, data: bytes
) -> None:
    # Whatever follows an MTA's offer is ignored, where only our own answer has symbol lists.
    parse = Negotiate.offer if letter == "O" else COMMANDS[ord(letter)].parse
    raw = packet(letter, data)
    try:
        parse(data)
    except RemoteProtocolError:
        with pytest.raises(RemoteProtocolError):
            check_command(raw)
    else:
        check_command(raw)


PARSERS: list[Callable[[bytes], object]] = [
    parse_command,
    parse_reply,
    split_strings,
    lambda data: list(packets(data)),
    lambda data: Framer().receive(data),
    Negotiate.offer,
    *(kind.parse for kind in (*COMMANDS.values(), *REPLIES.values())),
]


@given(st.sampled_from(PARSERS), st.one_of(st.binary(max_size=80), payloads))
@example(parse_command, b"")
@example(parse_reply, b"\0\0\0\1")
def test_garbage_is_nothing_worse_than_a_protocol_error(
    parse: Callable[[bytes], object], data: bytes
) -> None:
    with suppress(RemoteProtocolError):
        parse(data)


@pytest.mark.parametrize("parse", [parse_command, parse_reply])
def test_a_letter_of_nobody_is_named(parse: Callable[[bytes], object]) -> None:
    with pytest.raises(RemoteProtocolError, match="unknown packet letter b'\\?'"):
        parse(packet("?"))


def test_commands_and_replies_have_the_letters_of_the_protocol() -> None:
    assert bytes(COMMANDS) == b"ODCHMRTLNBEAQKU"
    assert set(REPLIES) == set(b"cartdsyphimb+2-eq") == set(LEGAL)


MALFORMED = {
    "a hello without a string": (Helo, b""),
    "a hello of two": (Helo, b"a\0b\0"),
    "a field without a value": (Header, b"Subject\0"),
    "an end of header that carries something": (Eoh, b"\0"),
    "a macro without its stage": (Macro, b""),
    "a macro without a value": (Macro, b"Ci\0"),
    "a client without a family": (Connect, b"host\0"),
    "a client without a name": (Connect, b"host"),
    "a port cut off": (Connect, b"host\x004\0"),
    "an address cut off": (Connect, b"host\x004\0\x19192.0.2.1"),
    "two addresses": (Connect, b"host\x004\0\x19192.0.2.1\x00192.0.2.2\0"),
    "an unknown family with an address": (Connect, b"host\0U\0\x19192.0.2.1\0"),
    "an index cut off": (InsertHeader, b"\0\0\0"),
    "a short negotiation": (Negotiate, b"\0\0\0\6" * 2),
    "a symbol list without its NUL": (Negotiate, b"\0\0\0\6" * 4 + b"i"),
    "a symbol list without its stage": (Negotiate, b"\0\0\0\6" * 3 + b"\0"),
}


@pytest.mark.parametrize(("kind", "payload"), list(MALFORMED.values()), ids=list(MALFORMED))
def test_a_payload_that_does_not_fit_is_an_error(kind: type[Packet], payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        kind.parse(payload)


def test_what_follows_an_offer_is_ignored() -> None:
    words = b"\0\0\0\6\0\0\1\xff\0\x1f\xff\xff"
    assert Negotiate.offer(words + b"more") == Negotiate(6, 0x1FF, 0x1FFFFF)


# Examples from real MTAs

MACROS_OF_MAIL = (("{mail_addr}", "alice@example.test"),)
EXAMPLES: dict[str, Packet] = {
    "0000000d 4f 00000006 000001ff 001fffff": Negotiate(6, 0x1FF, 0x1FFFFF),
    "0000000d 4f 00000006 000001ff 00000000": Negotiate(6, 0x1FF, 0),
    # "localhost", '4', port 51986
    "00000018 43 6c6f63616c686f737400 34 cb12 3132372e302e302e3100": Connect(
        "localhost", "4", 51986, "127.0.0.1"
    ),
    "00000002 44 48": Macro("H"),
    "00000015 48 636c69656e742e6578616d706c652e7465737400": Helo("client.example.test"),
    "00000021 44 4d 7b6d61696c5f616464727d00 616c696365406578616d706c652e7465737400": Macro(
        "M", MACROS_OF_MAIL
    ),
    "0000002d 4d 3c616c696365406578616d706c652e746573743e00 53495a453d31303000"
    "424f44593d384249544d494d4500": Mail("<alice@example.test>", ("SIZE=100", "BODY=8BITMIME")),
    "00000020 52 3c626f62406578616d706c652e6e65743e00 4e4f544946593d4e4556455200": Rcpt(
        "<bob@example.net>", ("NOTIFY=NEVER",)
    ),
    "00000010 44 54 6900 324232453631374530364300": Macro("T", (("i", "2B2E617E06C"),)),
    "00000001 54": Data(),
    "00000021 4c 46726f6d00 416c696365203c616c696365406578616d706c652e746573743e00": Header(
        "From", "Alice <alice@example.test>"
    ),
    "0000000c 4c 5375626a65637400 686900": Header("Subject", "hi"),
    "00000001 4e": Eoh(),
    "00000016 42 48656c6c6f0d0a 2e646f740d0a 2e2e646f74730d0a": Body(
        b"Hello\r\n.dot\r\n..dots\r\n"
    ),
    "00000001 45": Eom(),
    "00000001 41": Abort(),
    "00000001 51": Quit(),
    # Clients: unknown name, Sendmail's IPv6, no family, a UNIX socket, an unknown address
    "0000000e 43 5b3a3a315d00 36 8292 3a3a3100": Connect("[::1]", "6", 33426, "::1"),
    "00000031 43 6c6f63616c686f7374362e6578616d706c652e7465737400 36 adc0"
    "495076363a303a303a303a303a303a303a303a3100": Connect(
        "localhost6.example.test", "6", 44480, "IPv6:0:0:0:0:0:0:0:1"
    ),
    "0000000c 43 6c6f63616c686f737400 55": Connect("localhost", "U"),
    "0000000f 43 6c6f63616c686f737400 4c 0000 00": Connect("localhost", "L", 0, ""),
    "00000014 43 756e6b6e6f776e00 34 e010 756e6b6e6f776e00": Connect(
        "unknown", "4", 57360, "unknown"
    ),
    # The empty sender of mail that did not come by SMTP
    "00000002 4d 00": Mail(""),
    # Replies
    "00000001 63": Continue(),
    "00000001 70": Progress(),
    "0000000b 68 582d416464656400 7600": AddHeader("X-Added", "v"),
    "0000000d 69 00000000 582d546f7000 7400": InsertHeader(0, "X-Top", "t"),
    "00000019 6d 00000001 5375626a65637400 6e6577207375626a65637400": ChangeHeader(
        1, "Subject", "new subject"
    ),
    "0000000b 6d 00000001 4461746500 00": ChangeHeader(1, "Date", ""),
    "00000013 65 3c6e6577406578616d706c652e6f72673e00": ChangeSender("<new@example.org>"),
    "00000014 2b 3c64617665406578616d706c652e6e65743e00": AddRecipient("<dave@example.net>"),
    "00000021 32 3c6572696e406578616d706c652e6e65743e00 4e4f544946593d4e4556455200": (
        AddRecipientPar("<erin@example.net>", ("NOTIFY=NEVER",))
    ),
    "00000013 2d 3c626f62406578616d706c652e6e65743e00": DeleteRecipient("<bob@example.net>"),
    "0000000b 62 6e657720626f64790d0a": ReplaceBody(b"new body\r\n"),
    "0000000c 71 737573706963696f757300": Quarantine("suspicious"),
    "00000021 79 35353020352e372e31206e6f207468616e6b732c203130302525207375726500": ReplyCode(
        "550 5.7.1 no thanks, 100%% sure"
    ),
    "00000043 79 3535302d352e372e31206669727374206c696e650d0a"
    "3535302d352e372e31203130302525207365636f6e640d0a"
    "35353020352e372e31206c617374206c696e6500": ReplyCode(
        "550-5.7.1 first line\r\n550-5.7.1 100%% second\r\n550 5.7.1 last line"
    ),
    # Symbol lists: end of message is 5, end of headers is 6
    "00000074 4f 00000006 000001ff 00000000"
    "00000000 6a207b636c69656e745f616464727d207b636c69656e745f6e616d657d20"
    "7b636c69656e745f7074727d00"
    "00000003 7b726370745f616464727d00"
    "00000005 69207b6d61696c5f616464727d207b6e6f737563687d00"
    "00000006 00"
    "00000004 7b697d00": Negotiate(
        6,
        0x1FF,
        0,
        (
            (0, "j {client_addr} {client_name} {client_ptr}"),
            (3, "{rcpt_addr}"),
            (5, "i {mail_addr} {nosuch}"),
            (6, ""),
            (4, "{i}"),
        ),
    ),
}


@pytest.mark.parametrize(("text", "value"), list(EXAMPLES.items()))
def test_real_packets_mean_what_we_think(text: str, value: Packet) -> None:
    raw = bytes.fromhex(text)
    parse = parse_command if raw[4] in COMMANDS else parse_reply
    assert parse(raw) == value
    assert value.encode() == raw


# Framing


def reference(data: bytes) -> list[bytes]:
    """The packets of a stream, the plain way."""
    found = []
    while len(data) >= 4 and len(data) >= 4 + struct.unpack(">I", data[:4])[0]:
        end = 4 + struct.unpack(">I", data[:4])[0]
        found.append(data[:end])
        data = data[end:]
    return found


@given(
    st.lists(st.one_of(commands_, replies_), max_size=8).map(encoded),
    st.binary(max_size=3),
    st.lists(st.integers(0, 600), max_size=12),
)
def test_packets_are_cut_alike_whatever_pieces_they_come_in(
    data: bytes, tail: bytes, cuts: list[int]
) -> None:
    framer = Framer()
    stream = data + tail.replace(b"\1", b"\0")
    found = [packet for piece in sliced(stream, cuts) for packet in framer.receive(piece)]
    assert found == reference(data)


def test_a_large_packet_that_drips_in_is_handed_over_once() -> None:
    raw = packet("B", bytes(range(256)) * 400)
    framer = Framer()
    pieces = [raw[i : i + 100] for i in range(0, len(raw), 100)]
    found = [framer.receive(piece) for piece in pieces]
    assert found[-1] == [raw]
    assert not any(found[:-1])


def test_the_limits_are_those_that_mtas_live_with() -> None:
    assert MAX_CHUNK == 65_535
    assert MAX_PACKET == 1_048_576
    assert frame(b"c") == b"\0\0\0\1c"


@pytest.mark.parametrize("length", [1, 65_536, 1_048_576])
def test_a_length_up_to_the_limit_is_taken(length: int) -> None:
    assert checked_length(struct.pack(">I", length)) == length
    raw = packet("B", bytes(length - 1))
    assert Framer().receive(raw) == [raw]
    assert list(packets(raw)) == [(ord("B"), 5, length + 4)]


@pytest.mark.parametrize("length", [0, 1_048_577, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_length_beyond_the_limits_is_refused_before_anything_is_stored(
    length: int, before: int
) -> None:
    prefix = struct.pack(">I", length)
    framer = Framer()
    framer.receive(prefix[:before])
    with pytest.raises(RemoteProtocolError, match=f"packet length {length} is not between 1 and"):
        framer.receive(prefix[before:])


@pytest.mark.parametrize(
    "buffer",
    [
        b"\0",
        b"\0\0\0\1",
        b"\0\0\0\2c",
        b"\0\0\0\0c",
        packet("c") + b"\0\0",
        packet("c") + packet("h", b"X\0v\0")[:-1],
        packet("c") + b"\x80\0\0\0c",
    ],
)
def test_a_buffer_that_is_not_made_of_whole_packets_is_an_error(buffer: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        list(packets(buffer))
    with pytest.raises(RemoteProtocolError):
        list(packets(memoryview(buffer)))


def test_an_empty_buffer_has_no_packets() -> None:
    assert list(packets(b"")) == []


def test_the_length_tells_where_a_packet_ends_inside_a_buffer() -> None:
    buffer = packet("c") + packet("h", b"X\0v\0")
    assert list(packets(buffer)) == [(ord("c"), 5, 5), (ord("h"), 10, 14)]
