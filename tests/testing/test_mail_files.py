"""Messages are found in directories, Maildirs, mbox files and single files; others are named."""

from __future__ import annotations

import mailbox
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.errors import UsageError
from sharded_milter.testing.dialogue import Mail, transaction
from sharded_milter.testing.mail_files import MOST_RECIPIENTS, mail, normalised, read

HELLO = b"Subject: hi\n\nhello\n"


def written(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_eml", ".eml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_a_directory_gives_what_is_called_eml_below_it_in_order(tmp_path: Path) -> None:
    folder = written(
        tmp_path, b_eml=b"A: 2\n\n", a__c_eml=b"A: 3\n\n", A_eml=b"A: 1\n\n", notes=HELLO
    )
    found = read(folder)
    assert [mail.raw[3:4] for mail in found.mails] == [b"1", b"2", b"3"]
    assert [mail.queue_id for mail in found.mails] == ["0000000001", "0000000002", "0000000003"]
    assert found.skipped == []


def test_a_maildir_has_no_suffixes(tmp_path: Path) -> None:
    written(tmp_path, cur__one=HELLO, new__two=HELLO, tmp__three=HELLO)
    assert len(read(tmp_path).mails) == 2


def test_an_mbox_file_gives_each_message_without_its_separator(tmp_path: Path) -> None:
    path = tmp_path / "box"
    box = mailbox.mbox(path)
    for n in range(3):
        box.add(mailbox.mboxMessage(b"Subject: %d\n\nhello\n" % n))
    box.flush()
    box.close()
    assert [mail.raw for mail in read(path).mails] == [
        b"Subject: %d\r\n\r\nhello\r\n" % n for n in range(3)
    ]


def test_any_other_file_is_one_message(tmp_path: Path) -> None:
    written(tmp_path, one=HELLO)
    assert [mail.raw for mail in read(tmp_path / "one").mails] == [HELLO.replace(b"\n", b"\r\n")]


def test_what_is_no_message_is_named_and_skipped(tmp_path: Path) -> None:
    written(tmp_path, a_eml=b"", b_eml=b"\0\0 no header\n", c_eml=HELLO)
    (tmp_path / "d.eml").symlink_to("nowhere")
    os.mkfifo(tmp_path / "e.eml")
    found = read(tmp_path)
    assert len(found.mails) == 1
    assert found.skipped == [
        f"{tmp_path}/a.eml: skipped: it is empty",
        f"{tmp_path}/b.eml: skipped: it has no header",
    ]


def test_what_cannot_be_read_is_named_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, a_eml=HELLO, b_eml=HELLO, sub__c_eml=HELLO)

    def refused(path: Path) -> bytes:  # the tests may run as root, who may read everything
        if path.name == "a.eml":
            raise PermissionError(13, "Permission denied", str(path))
        return HELLO

    scandir = os.scandir

    def refuses(path: str) -> object:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr(os, "scandir", refuses)
    found = read(tmp_path)
    assert len(found.mails) == 1
    assert found.skipped == [
        f"{tmp_path}/a.eml: skipped: Permission denied",
        f"{tmp_path}/sub: skipped: Permission denied",
    ]


def test_a_place_without_messages_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^there is no message in {tmp_path}$"):
        read(tmp_path)
    written(tmp_path, a_eml=b"")
    with pytest.raises(UsageError, match=r"no message in .* \(.*a.eml: skipped: it is empty\)$"):
        read(tmp_path)
    written(tmp_path, b_eml=b"")
    with pytest.raises(UsageError, match=r"no message in .* \(2 skipped\)$"):
        read(tmp_path)
    with pytest.raises(UsageError, match="nothing: No such file or directory"):
        read(tmp_path / "nothing")


def test_no_more_is_read_than_fits(tmp_path: Path) -> None:
    written(tmp_path, a_eml=HELLO, b_eml=HELLO, c_eml=HELLO)
    found = read(tmp_path, 50)
    assert len(found.mails) == 2
    assert found.skipped == [
        f"{tmp_path}/c.eml: skipped with all messages after it: more than 50 bytes in all"
    ]
    assert len(read(tmp_path, 1).mails) == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"A: b\n\nc", b"A: b\r\n\r\nc\r\n"),
        (b"A: b\r\n\r\nc\n", b"A: b\r\n\r\nc\r\n"),
        (b"From x Mon\nA: b\n", b"A: b\r\n"),
        (b"\xef\xbb\xbfA: b\n", b"A: b\r\n"),
        (b"A: b\rc\n", b"A: b\rc\r\n"),
        (b"", b""),
        (b"\nbody\n", b""),
    ],
)
def test_line_ends_are_those_of_smtp(raw: bytes, message: bytes) -> None:
    assert normalised(raw) == message


@pytest.mark.parametrize(
    ("header", "sender", "recipients"),
    [
        (b"Subject: x", Mail.sender, Mail.recipients),
        (b"From: A <a@b.c>\r\nTo: X <x@y.z>, w@y.z\r\nCc: v@y.z", "a@b.c",
         ("x@y.z", "w@y.z", "v@y.z")),
        (b"Return-Path: <r@b.c>\r\nFrom: a@b.c\r\nDelivered-To: d@y.z\r\nTo: x@y.z", "r@b.c",
         ("d@y.z",)),
        (b"return-path: <>\r\nFrom: a@b.c", "", Mail.recipients),
        (b"From: nobody\r\nTo: undisclosed-recipients:;", Mail.sender, Mail.recipients),
        (b"To: " + b", ".join(b"a%d@b.c" % n for n in range(99)), Mail.sender,
         tuple(f"a{n}@b.c" for n in range(MOST_RECIPIENTS))),
    ],
)  # fmt: skip
def test_the_header_tells_the_envelope(
    header: bytes, sender: str, recipients: tuple[str, ...]
) -> None:
    made = mail(header + b"\r\n\r\n", "Q")
    assert (made.sender, made.recipients) == (sender, recipients)


PIECES = st.sampled_from([b"From: ", b"To: ", b"\n", b"\0", b"<", b">", b"@", b"a", b"\xff", b'"',
                          b"(", b",", b":", b";", b"=?utf-8?q?", b"Return-Path: "])  # fmt: skip


@given(st.lists(PIECES).map(b"".join))
def test_any_file_is_a_mail_that_can_be_sent_or_none(raw: bytes) -> None:
    message = normalised(raw)
    assert not message or message.endswith(b"\r\n")
    for packet in transaction(mail(message, "Q")):
        assert packet.encode()
