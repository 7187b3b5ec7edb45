"""Splitting a message: its parts, their names and contents, and the limits."""

import base64
import binascii
import time
from email.message import EmailMessage, Message
from email.mime.message import MIMEMessage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanner_samples import leaves, mail, stopped

from sharded_milter.scanner.limits import Budget, OutOfTime, ScanLimits
from sharded_milter.scanner.mime import walk
from sharded_milter.scanner.parts import Mark, plain_name

LATIN = "grüße.pdf".encode("latin-1")


def entity(fields: bytes, body: bytes = b"text") -> bytes:
    return fields + b"\r\n\r\n" + body


def in_multipart(*entities: bytes, boundary: bytes = b"b") -> bytes:
    delimiter = b"--" + boundary
    lines = [b"Content-Type: multipart/mixed; boundary=" + boundary, b""]
    for each in entities:
        lines += [delimiter, each]
    return b"\r\n".join([*lines, delimiter + b"--", b""])


def data_of(raw: bytes) -> list[bytes]:
    return [part.data for part in leaves(raw)]


def test_each_leaf_of_an_ordinary_mail_is_a_part_with_name_and_type() -> None:
    found = leaves(mail(("a.bin", b"\0\1\2"), text="hällo\n"))
    assert [(part.name, part.content_type) for part in found] == [
        ("", "text/plain"),
        ("a.bin", "application/octet-stream"),
    ]
    assert found[0].data.decode().splitlines() == ["hällo"]
    assert found[1].data == b"\0\1\2"


@pytest.mark.parametrize(
    ("encoding", "body", "decoded"),
    [
        (b"base64", b"aGVsbG8=", b"hello"),
        (b"BASE64 (really)", b"aGVsbG8=", b"hello"),
        (b"base64", b"aGV*sb\r\nG8", b"hello"),
        (b"base64", b"aGVsbG8=IHdvcmxk", b"hello world"),
        (b"base64", b"aGVsbG8h!Q", b"hello!"),
        (b"base64", b"=====", b""),
        (b"quoted-printable", b"h=65ll=\r\no=", b"hello"),
        (b"quoted-printable", b"=ZZ=", b"=ZZ"),
        (b"x-uuencode", b"begin 644 x\r\n%:&5L;&\\\r\n`\r\nend\r\n", b"hello"),
        (b"7bit", b"hello", b"hello"),
        (b"no-such-encoding", b"hello", b"hello"),
        (b"", b"h\xe9llo", b"h\xe9llo"),
    ],
)
def test_transfer_encodings_are_read_as_far_as_they_can_be(
    encoding: bytes, body: bytes, decoded: bytes
) -> None:
    assert data_of(entity(b"Content-Transfer-Encoding: " + encoding, body)) == [decoded]


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (b'Content-Disposition: attachment; filename="a.exe"', "a.exe"),
        (b"Content-Disposition: attachment;\r\n\tfilename=a.exe", "a.exe"),
        (b'Content-Type: text/plain; name="a.exe"', "a.exe"),
        (b"content-DISPOSITION : x; FILENAME=a.exe", "a.exe"),
        (b"Content-Disposition: x; filename*=utf-8''gr%C3%BC%C3%9Fe.pdf", "grüße.pdf"),
        (b"Content-Disposition: x; filename*0=a.; filename*1=exe", "a.exe"),
        (b"Content-Disposition: x; filename*0*=utf-8''gr%C3%BC; filename*1=n", "grün"),
        (b"Content-Disposition: x; filename*=no-such-charset''a.exe", "a.exe"),
        (b'Content-Disposition: x; filename="=?utf-8?B?Z3LDvG4uZXhl?="', "grün.exe"),
        (b'Content-Disposition: x; filename="=?bad?x?a.exe?="', "=?bad?x?a.exe?="),
        (b"Content-Disposition: x; filename=" + "grüße.pdf".encode(), "grüße.pdf"),
        (b"Content-Disposition: x; filename=" + LATIN, "grüße.pdf"),
        (b'Content-Disposition: x; filename="a\0.exe\x7f"', "a.exe"),
        (b"Content-Disposition: x; filename*=utf-8''a%00%0A.exe", "a.exe"),
        (b"Content-Disposition: attachment", ""),
        (b"Content-Disposition: x; filename*=a\0b'c'd; filename*x=", ""),
    ],
)
def test_a_name_is_clean_text_however_it_is_written(field: bytes, name: str) -> None:
    assert [part.name for part in leaves(entity(field))] == [name]


def test_the_end_of_an_endless_name_is_kept() -> None:
    name = plain_name("x" * 5000 + ".pdf.exe")
    assert len(name) == 1024
    assert name.endswith(".pdf.exe")


@given(st.text(st.characters(codec=None, categories=None, exclude_categories=())))
def test_any_name_becomes_one_line_that_can_be_encoded(name: str) -> None:
    clean = plain_name(name)
    assert clean.encode("utf-8").decode("utf-8") == clean
    assert not any(ord(character) < 32 for character in clean)


# The tree


def test_a_message_in_a_message_is_walked() -> None:
    inner = EmailMessage()
    inner.set_content("inner\n")
    inner.add_attachment(b"data", maintype="a", subtype="b", filename="deep")
    outer = MIMEMultipart()
    outer.attach(MIMEText("outer\n"))
    outer.attach(MIMEMessage(inner))
    assert data_of(outer.as_bytes()) == [b"outer\n", b"inner\n", b"data"]


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable"])
def test_an_encoded_message_in_a_message_is_walked_though_it_must_not_be(encoding: str) -> None:
    encode = base64.encodebytes if encoding == "base64" else binascii.b2a_qp
    inner = in_multipart(entity(b"Content-Disposition: x; filename=deep", b"data"))
    fields = f"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: {encoding}".encode()
    [part] = leaves(entity(fields, encode(inner)))
    assert (part.name, part.data) == ("deep", b"data")


def test_a_digest_holds_messages_unless_it_says_otherwise() -> None:
    inner = entity(b"Subject: inner\r\nContent-Transfer-Encoding: base64", b"aGVsbG8=")
    raw = in_multipart(entity(b"", b"")[2:] + inner).replace(b"/mixed", b"/digest")
    assert data_of(raw) == [b"hello"]


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (b"", [b""]),
        (b"\r\n", [b""]),
        (b"no header, one line", [b"no header, one line"]),
        (b"no header\r\n\r\nbut a blank line", [b"no header\r\n\r\nbut a blank line"]),
        (b"Subject: no body", [b""]),
        (b"Subject: x\r\n\r\n", [b""]),
        (b"Subject: bare\n\nbody", [b"body"]),
        (b"From me Mon\r\nSubject: x\r\n\r\nbody", [b"body"]),
        (b"Content-Type: multipart/mixed\r\n\r\nno boundary", [b"no boundary"]),
        (b"Content-Type: multipart/mixed; boundary=b\r\n\r\nnever used", [b"never used"]),
        (
            b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nnot closed",
            [b"not closed"],
        ),
        (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b", [b""]),
        (in_multipart(b"\r\none", b"\r\ntwo"), [b"one", b"two"]),
        (in_multipart(b"\r\none", b"\r\ntwo").replace(b"\r\n", b"\n"), [b"one", b"two"]),
        (in_multipart(b"\r\none") + b"--b\r\n\r\nafter the end", [b"one", b"after the end"]),
        (in_multipart(b"\r\none\r\n--bb\r\n--b x\r\n x--b"), [b"one\r\n--bb\r\n--b x\r\n x--b"]),
        (in_multipart(b"", b""), [b"", b""]),
        (in_multipart(b"text without a header"), [b"text without a header"]),
        (in_multipart(in_multipart(b"\r\nsame boundary")), [b"", b"same boundary"]),
        (in_multipart(b"\r\n8-bit", boundary=b"b\xe9"), [b"8-bit"]),
        (b"junk\r\nContent-Transfer-Encoding: base64\r\n\r\naGVsbG8=", [b"hello"]),
        (b"Content-Type: \r\nContent-Type: /\r\n\r\nx", [b"x"]),
    ],
)
def test_broken_messages_have_the_parts_that_can_be_seen(raw: bytes, parts: list[bytes]) -> None:
    assert data_of(raw) == parts


def nested(depth: int) -> bytes:
    raw = entity(b"Content-Type: text/plain", b"core")
    for level in range(depth):
        raw = in_multipart(raw, boundary=b"level%d." % level)
    return raw


def test_mime_deeper_than_the_limit_is_a_mark() -> None:
    limits = ScanLimits(mime_depth=3)
    assert [(part.data, part.marks) for part in leaves(nested(3), limits)] == [
        (b"core", frozenset())
    ]
    *_, last = leaves(nested(4), limits)
    assert last.marks == {Mark.FLOODED}


def test_more_mime_parts_than_the_limit_are_a_mark_and_the_first_are_parts() -> None:
    limits = ScanLimits(mime_parts=4)  # the message and three in it
    raw = in_multipart(b"\r\n1", b"\r\n2", b"\r\n3")
    assert len(leaves(raw, limits)) == 3
    flooded = leaves(in_multipart(b"\r\n1", b"\r\n2", b"\r\n3", b"\r\n4"), limits)
    assert [part.data for part in flooded] == [b"1", b"2", b"3", b""]
    assert flooded[-1].marks == {Mark.FLOODED}


def test_encoded_messages_count_as_opened_bytes() -> None:
    fields = b"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: base64"
    raw = entity(fields, base64.encodebytes(bytes(100)))
    assert leaves(raw, ScanLimits(opened=99))[-1].marks == {Mark.FLOODED}
    assert not leaves(raw, ScanLimits(opened=100))[-1].marks


def test_the_walk_ends_when_the_seconds_of_the_message_are_over() -> None:
    now = iter(range(100))
    with pytest.raises(OutOfTime, match="60 s"):
        list(walk(in_multipart(*[b"\r\nx"] * 100), Budget(ScanLimits(), lambda: next(now))))


@pytest.mark.parametrize(
    "raw",
    [
        nested(99)[:-4] + b"\n" * 1_000_000,
        in_multipart(*[b""] * 100_000),
        b"Content-Type: multipart/mixed; boundary=" + b'"' + b";" * 1_000_000,
        b"Content-Disposition: x" + b"; filename*1=a" * 70_000 + b"\r\n\r\n",
        b"Content-Type: a/b\r\n" * 50_000,
        b"Content-Transfer-Encoding: base64\r\n\r\n" + b"QQ=" * 300_000,
        b"\n" * 1_000_000,
        b"--" * 500_000,
    ],
    ids=["deep", "wide", "quotes", "continuations", "fields", "paddings", "lines", "dashes"],
)
def test_a_megabyte_that_is_costly_to_the_stdlib_is_walked_in_seconds(raw: bytes) -> None:
    begin = time.process_time()
    leaves(raw)
    assert time.process_time() - begin < 5


@given(st.binary(max_size=2000))
def test_any_bytes_have_parts_no_longer_than_they_are(raw: bytes) -> None:
    assert sum(len(part.data) for part in leaves(raw)) <= len(raw)


FRAGMENTS = st.sampled_from(
    [
        b"--b\r\n",
        b"--b--\r\n",
        b"--",
        b"\r\n",
        b"\n",
        b"Content-Type: multipart/x; boundary=b\r\n",
        b"Content-Type: message/rfc822\r\n",
        b"Content-Transfer-Encoding: base64\r\n",
        b'Content-Disposition: a; filename="',
        b"; filename*0*=utf-8''%",
        b"=?utf-8?q?",
        b"QUJD=",
    ]
)


@given(st.lists(FRAGMENTS | st.binary(max_size=8), max_size=60))
def test_any_pile_of_mime_fragments_is_walked(fragments: list[bytes]) -> None:
    raw = b"".join(fragments)
    assert sum(len(part.data) for part in leaves(raw)) <= len(raw)


@given(st.recursive(st.binary(max_size=50), lambda inner: st.lists(inner, min_size=1, max_size=3)))
def test_every_leaf_the_stdlib_writes_is_found_again(tree: object) -> None:
    wanted: list[bytes] = []

    def build(node: object) -> Message:
        if isinstance(node, list):
            multipart = MIMEMultipart()
            for child in node:
                multipart.attach(build(child))
            return multipart
        assert isinstance(node, bytes)
        wanted.append(node)
        leaf = Message()
        leaf["Content-Type"] = "application/octet-stream"
        leaf["Content-Transfer-Encoding"] = "base64"
        leaf.set_payload(base64.encodebytes(node).decode())
        return leaf

    assert data_of(build(tree).as_bytes()) == wanted


def test_the_budget_gives_rules_what_is_left_but_a_second_at_least() -> None:
    now = [0.0]
    budget = Budget(ScanLimits(message_seconds=30, part_seconds=20), lambda: now[0])
    seconds = []
    for now[0] in (0.0, 15.5, 29.9, 100.0):
        seconds.append(budget.part_seconds())
    assert seconds == [20, 14, 1, 1]
    assert Budget(ScanLimits(), stopped).part_seconds() == 20
