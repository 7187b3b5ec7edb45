"""The values that callbacks get: spelling, look-up, and a byte-exact message."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter import Address, Connection, Envelope, Header, Headers, Macros, Message
from sharded_milter.api.values import other_spelling
from sharded_milter.protocol.text import to_text

CLIENT = Connection("client.example")
ENVELOPE = Envelope(CLIENT, Address("<a@example.org>"))

#: Any byte that a header can hold; NUL and line ends are the wire's.
LINES = st.binary(max_size=40).map(lambda raw: bytes(b for b in raw if b not in b"\0\r\n"))
FOLDED = st.lists(LINES, min_size=1, max_size=4).map(lambda lines: b"\n\t".join(lines))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("i", "{i}"),
        ("{i}", "i"),
        ("{if_name}", "{if_name}"),
        ("ab", "ab"),
        ("{ab", "{ab"),
        ("", ""),
    ],
)
def test_only_names_of_one_character_have_two_spellings(name: str, other: str) -> None:
    assert other_spelling(name) == other


@pytest.mark.parametrize("sent", ["i", "{i}"])
@pytest.mark.parametrize("asked", ["i", "{i}"])
def test_a_macro_of_one_character_is_found_in_both_spellings(sent: str, asked: str) -> None:
    macros = Macros([(sent, "4F1")])
    assert macros[asked] == "4F1"
    assert asked in macros


def test_a_later_macro_hides_an_earlier_one_however_it_is_spelled() -> None:
    macros = Macros([("i", "old"), ("j", "mx"), ("{i}", "new"), ("{mail_addr}", "a")])
    assert (macros["i"], macros["{i}"], len(macros)) == ("new", "new", 3)
    assert dict(macros) == {"j": "mx", "{i}": "new", "{mail_addr}": "a"}
    assert repr(macros) == "Macros({'j': 'mx', '{i}': 'new', '{mail_addr}': 'a'})"


def test_a_macro_that_was_not_sent_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Macros()["{auth_authen}"]
    assert Macros().get("i", "none") == "none"


@pytest.mark.parametrize(
    ("raw", "text", "local", "domain"),
    [
        ("<bob@example.org>", "bob@example.org", "bob", "example.org"),
        ("bob@example.org", "bob@example.org", "bob", "example.org"),
        (" <bob@example.org> ", "bob@example.org", "bob", "example.org"),
        ("<>", "", "", ""),
        ("", "", "", ""),
        ("<postmaster>", "postmaster", "postmaster", ""),
        ('<"a@b"@example.org>', '"a@b"@example.org', '"a@b"', "example.org"),
        ("<bob@example.org", "<bob@example.org", "<bob", "example.org"),
    ],
)
def test_an_address_prints_without_brackets(raw: str, text: str, local: str, domain: str) -> None:
    address = Address(raw, ("SIZE=100",))
    assert (str(address), address.local, address.domain) == (text, local, domain)
    assert (address.raw, address.esmtp) == (raw, ("SIZE=100",))


HEADERS = Headers(
    [Header("Received", "one"), Header("Subject", "Hi"), Header("RECEIVED", "two", "")]
)


def test_headers_are_looked_up_without_regard_to_case() -> None:
    assert HEADERS["subject"] == "Hi"
    assert HEADERS["received"] == "one"
    assert HEADERS.get_all("Received") == ["one", "two"]
    assert HEADERS.get("X-Missing") is None
    assert HEADERS.get("X-Missing", "none") == "none"
    with pytest.raises(KeyError, match="X-Missing"):
        HEADERS["X-Missing"]


def test_headers_are_a_sequence_of_fields() -> None:
    assert len(HEADERS) == 3
    assert HEADERS[1] == Header("Subject", "Hi")
    assert list(HEADERS[:2]) == [Header("Received", "one"), Header("Subject", "Hi")]
    assert [header.name for header in HEADERS] == ["Received", "Subject", "RECEIVED"]


def test_headers_contain_names_and_fields() -> None:
    assert "SUBJECT" in HEADERS
    assert "X-Missing" not in HEADERS
    assert Header("Subject", "Hi") in HEADERS
    assert Header("Subject", "hi") not in HEADERS


def test_headers_with_equal_fields_are_equal() -> None:
    same = Headers(list(HEADERS))
    assert same == HEADERS
    assert hash(same) == hash(HEADERS)
    assert Headers() != HEADERS
    assert Headers() != []
    assert repr(Headers([Header("A", "b")])) == "Headers([Header(name='A', value='b', space=' ')])"


def test_macros_are_no_part_of_what_makes_two_values_equal() -> None:
    assert Connection("a", macros=Macros([("j", "mx")])) == Connection("a")
    with_macros = Envelope(CLIENT, Address(""), macros=Macros([("i", "4F1")]))
    assert with_macros == Envelope(CLIENT, Address(""))
    assert hash(with_macros) == hash(Envelope(CLIENT, Address("")))
    assert with_macros.queue_id == "4F1"


def test_an_envelope_without_a_queue_id_has_an_empty_one() -> None:
    assert ENVELOPE.queue_id == ""


def test_a_message_has_the_short_cuts_of_its_envelope() -> None:
    envelope = Envelope(CLIENT, Address("<a@b>"), (Address("<c@d>"),), Macros([("i", "4F1")]))
    message = Message(envelope, HEADERS, b"text\r\n")
    assert message.connection is CLIENT
    assert message.sender is envelope.sender
    assert message.recipients is envelope.recipients
    assert message.macros is envelope.macros
    assert message.queue_id == "4F1"
    assert message.size == len(bytes(message))


def test_the_bytes_of_a_message_are_the_mail() -> None:
    assert bytes(Message(ENVELOPE, HEADERS, b"text\r\n")) == (
        b"Received: one\r\nSubject: Hi\r\nRECEIVED:two\r\n\r\ntext\r\n"
    )
    assert bytes(Message(ENVELOPE, Headers(), b"")) == b"\r\n"


def test_a_parsed_message_is_the_standard_librarys() -> None:
    headers = Headers([Header("Subject", "=?utf-8?q?f=C3=BCnf?="), Header("To", "a@b,\n\tc@d")])
    parsed = Message(ENVELOPE, headers, b"text\r\n").parsed()
    assert parsed["subject"] == "fünf"
    assert parsed["to"].addresses[1].addr_spec == "c@d"
    assert parsed.get_content() == "text\r\n"


@given(FOLDED, st.sampled_from(["", " "]))
def test_a_field_keeps_every_byte_and_folds_with_crlf(value: bytes, space: str) -> None:
    written = bytes(Header("X", to_text(value), space))
    assert written == b"X:" + space.encode() + value.replace(b"\n", b"\r\n") + b"\r\n"


@pytest.mark.parametrize("value", ["a\r\n\tb", "a\n\tb"])
def test_a_field_that_is_folded_with_crlf_is_not_folded_twice(value: str) -> None:
    assert bytes(Header("X", value)) == b"X: a\r\n\tb\r\n"


def chunked(*chunks: bytes) -> Message:
    return Message.from_chunks(
        Envelope(Connection("client"), Address("<a@b>")),
        Headers([Header("Subject", "x")]),
        [memoryview(chunk) for chunk in chunks],
    )


def test_a_body_in_chunks_is_joined_when_it_is_looked_at() -> None:
    message = chunked(b"one ", b"two")
    assert [bytes(chunk) for chunk in message.chunks] == [b"one ", b"two"]
    assert message.size == len(bytes(message)) == len(b"Subject: x\r\n\r\none two")
    assert "body" not in vars(message)
    assert message.body == b"one two"
    assert message.body is message.body


def test_a_message_is_the_same_however_its_body_came() -> None:
    message = chunked(b"one ", b"two")
    whole = Message(message.envelope, message.headers, b"one two")
    assert message == whole
    assert [bytes(chunk) for chunk in whole.chunks] == [b"one two"]
    assert whole.size == message.size
    for copied in (copy.copy(message), copy.deepcopy(message), pickle.loads(pickle.dumps(message))):
        assert copied == whole
    assert dataclasses.replace(message, body=b"other").body == b"other"


def test_a_message_has_no_other_attributes() -> None:
    with pytest.raises(AttributeError, match="'Message' object has no attribute 'bodies'"):
        chunked().bodies  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(Message.__new__(Message), "body")
