"""Parsing a transcript into the values that callbacks get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter import Address, Connection, Envelope, Header, Headers
from sharded_milter.dialects.transcript import MAX_ENVELOPES, EnvelopeReader, ParsedTranscript, read
from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Protocol
from sharded_milter.protocol.text import to_text
from sharded_milter.protocol.wire import frame

REFUSED = replies.Reject()
LEADSPC = commands.Negotiate(6, 0, Protocol.HDR_LEADSPC)
PLAIN = commands.Negotiate(6, 0, 0)


def packed(*packets: Packet) -> bytes:
    return b"".join(packet.encode() for packet in packets)


def reading(*packets: Packet, connection: tuple[Packet, ...] = ()) -> ParsedTranscript:
    return read(packed(*connection), packed(*packets))


def macros(stage: str, **values: str) -> commands.Macro:
    return commands.Macro(stage, tuple(values.items()))


@pytest.mark.parametrize(
    ("command", "family", "address", "port"),
    [
        (commands.Connect("a", "4", 25, "192.0.2.1"), "inet", "192.0.2.1", 25),
        (commands.Connect("a", "6", 25, "2001:db8::1"), "inet6", "2001:db8::1", 25),
        (commands.Connect("a", "6", 25, "IPv6:0:0:0:0:0:0:0:1"), "inet6", "0:0:0:0:0:0:0:1", 25),
        (commands.Connect("a", "6", 25, "ipv6:::1"), "inet6", "::1", 25),
        (commands.Connect("a", "L", 0, "/run/x"), "unix", "/run/x", 0),
        (commands.Connect("a", "L", 0, ""), "unix", "", 0),
        (commands.Connect("a", "U"), "unknown", "", 0),
        (commands.Connect("a", "4", 57360, "unknown"), "unknown", "", 57360),
        (commands.Connect("a", "4", 0, "192.0.2"), "unknown", "", 0),
        (commands.Connect("a", "6", 0, "IPv6:"), "unknown", "", 0),
    ],
    ids=str,
)
def test_the_client_is_told_however_the_mta_spells_it(
    command: commands.Connect, family: str, address: str, port: int
) -> None:
    connection = reading(connection=(command,)).connection_value()
    assert connection == Connection("a", family, address, port)


def test_a_conversation_without_connect_has_an_unknown_client() -> None:
    assert reading().connection_value() == Connection("")
    assert reading().envelope_value() == Envelope(Connection(""), Address(""))


def test_the_last_greeting_counts() -> None:
    connection = (commands.Connect("a", "U"), commands.Helo("one"), commands.Helo("two"))
    assert reading(connection=connection).connection_value().helo == "two"


def test_refused_recipients_are_no_part_of_the_envelope() -> None:
    names = ["<a@x>", "<b@x>", "<c@x>", "<d@x>"]
    a, b, c, d = (commands.Rcpt(name) for name in names)
    envelope = reading(
        commands.Mail("<s@x>"), a, REFUSED, macros("R"), b, c, REFUSED, macros("R"), d
    ).envelope_value()
    assert envelope.recipients == (Address("<b@x>"), Address("<d@x>"))


def test_a_refused_data_takes_no_recipient_along() -> None:
    recipient = commands.Rcpt("<a@x>")
    envelope = reading(recipient, commands.Data(), REFUSED, commands.Data()).envelope_value()
    assert envelope.recipients == (Address("<a@x>"),)


def test_a_refusal_without_what_it_refused_is_nothing() -> None:
    assert reading(REFUSED, REFUSED, commands.Rcpt("<a@x>")).recipients == [Address("<a@x>")]


def test_esmtp_parameters_stay_with_their_address() -> None:
    envelope = reading(
        commands.Mail("<s@x>", ("SIZE=1", "BODY=8BITMIME")),
        commands.Rcpt("<a@x>", ("NOTIFY=NEVER",)),
    ).envelope_value()
    assert envelope.sender == Address("<s@x>", ("SIZE=1", "BODY=8BITMIME"))
    assert envelope.recipients == (Address("<a@x>", ("NOTIFY=NEVER",)),)


def test_a_connection_sees_the_macros_of_connect_and_helo_only() -> None:
    connection = (macros("C", j="mx", i="old"), macros("H", h="greeting"))
    transcript = reading(macros("M", i="4F1"), connection=connection)
    assert dict(transcript.connection_value().macros) == {"j": "mx", "i": "old", "h": "greeting"}


def test_later_macros_hide_earlier_ones_in_libmilters_order() -> None:
    stages = ["M", "R", "T", "N", "E"]
    for last in range(1, len(stages) + 1):
        sent = [macros(stage, i=stage) for stage in reversed(stages[:last])]
        envelope = reading(*sent, connection=(macros("C", i="C"),)).envelope_value()
        assert envelope.macros["{i}"] == stages[last - 1]


def test_the_macros_of_a_stage_are_replaced_as_a_whole() -> None:
    transcript = reading(macros("R", a="1", b="2"), macros("R", a="3"))
    assert dict(transcript.envelope_value().macros) == {"a": "3"}


def test_the_blank_behind_the_colon_is_told_apart_where_the_mta_sends_it() -> None:
    fields = [commands.Header("A", " x"), commands.Header("B", "x"), commands.Header("C", "  x")]
    assert reading(*fields, connection=(LEADSPC,)).headers_value() == Headers(
        [Header("A", "x"), Header("B", "x", ""), Header("C", " x")]
    )
    assert reading(*fields, connection=(PLAIN,)).headers_value() == Headers(
        [Header("A", " x"), Header("B", "x"), Header("C", "  x")]
    )


def test_the_body_is_put_together_from_its_chunks() -> None:
    chunks = [commands.Body(b"a\r"), commands.Body(b"\nb"), commands.Eom(b"\r\n")]
    assert reading(*chunks).message_value().body == b"a\r\nb\r\n"


def test_an_unknown_command_is_told() -> None:
    assert reading(commands.Unknown("XYZZY 1")).command == "XYZZY 1"


@pytest.mark.parametrize(
    "packet",
    [
        frame(b"M", b"no nul"), frame(b"C", b"x"), b"\0\0\0\x09Bcut off", b"\0\0\0\0", frame(b"D"),
        frame(b"D", b"Mi\0"), frame(b"D", b"Mi\0no nul"), frame(b"L", b"Subject\0"),
        frame(b"L", b"a\0b\0c\0"), frame(b"L", b"a\0b"), frame(b"M"), frame(b"R"), b"\0\0\0\1",
    ],
)  # fmt: skip
def test_a_malformed_transcript_is_refused(packet: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read(b"", packet)


#: Any byte that a header or a body can hold; NUL and bare line ends do not come from an MTA.
NAMES = st.text("ABab-!~", min_size=1, max_size=10)
LINES = st.binary(max_size=30).map(lambda raw: bytes(b for b in raw if b not in b"\0\r\n"))
VALUES = st.lists(LINES, min_size=1, max_size=4).map(lambda lines: b"\n ".join(lines))


@given(st.lists(st.tuples(NAMES, VALUES), max_size=5), st.lists(st.binary(max_size=40), max_size=4))
def test_the_bytes_of_the_message_are_those_of_the_mail(
    fields: list[tuple[str, bytes]], chunks: list[bytes]
) -> None:
    mail = b"".join(name.encode() + b":" + value + b"\n" for name, value in fields)
    mail = mail.replace(b"\n", b"\r\n") + b"\r\n" + b"".join(chunks)
    sent = [commands.Header(name, to_text(value)) for name, value in fields]
    transcript = reading(*sent, *map(commands.Body, chunks), connection=(LEADSPC,))
    assert bytes(transcript.message_value()) == mail


@given(st.lists(st.lists(st.sampled_from("MRrDT"), max_size=8), max_size=5), st.data())
def test_an_envelope_that_grows_is_read_as_if_it_were_read_whole(
    conversation: list[list[str]], data: st.DataObject
) -> None:
    """Parse messages of several connections, up to any place and in any order."""
    pieces = {
        "M": commands.Mail("<a@x>"), "R": commands.Rcpt("<b@x>"), "r": replies.Reject(),
        "D": commands.Macro("R", (("i", "1"),)), "T": commands.Data(),
    }  # fmt: skip
    envelopes = EnvelopeReader()
    connection = commands.Connect("client", "U").encode()
    for turn, letters in enumerate(conversation):
        message = commands.Mail(f"<{turn}@x>").encode()
        for letter in letters:
            if letter == "r" and not message.endswith(pieces["R"].encode()):
                continue
            message += pieces[letter].encode()
            if data.draw(st.booleans()):
                where = data.draw(st.sampled_from([connection, b""]))
                view = memoryview(message) if data.draw(st.booleans()) else message
                assert envelopes.read(where, view) == read(where, message)


def test_envelopes_of_connections_that_are_long_gone_are_forgotten() -> None:
    envelopes = EnvelopeReader()
    for number in range(3 * MAX_ENVELOPES):
        envelopes.read(commands.Helo(str(number)).encode(), commands.Mail("<a@x>").encode())
    assert len(envelopes._read_before) == MAX_ENVELOPES


def test_the_names_of_the_header_fields_are_told_in_order() -> None:
    fields = [commands.Header(name, " x") for name in ("Subject", "X-\udcff", "subject")]
    assert reading(*fields).header_names() == ["Subject", "X-\udcff", "subject"]
