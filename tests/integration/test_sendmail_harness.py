"""The private Sendmail itself: what other tests rely on, without any milter of ours."""

import os
import shutil
import smtplib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from .machine import free_port
from .postfix import submit
from .sendmail import Sendmail, require_sendmail

pytestmark = pytest.mark.integration

MESSAGE = (
    b"From: sender@example.org\r\n"
    b"date: Thu, 01 Jan 1970 00:00:00 +0000\r\n"
    b"Message-ID:<1@example.org>\r\n"
    b"Subject: folded\r\n\tand folded\r\n again\r\n"
    b"X-Bytes: caf\xc3\xa9 \x80\x99\xff\r\n"
    b"x-case:no blank\r\n"
    b"\r\n"
    b".dot first\r\n..\r\nFrom here 8-bit \xe9\x80\xff\r\n\r\n"
)
SECOND = b"Subject: second\r\n\r\nno final newline"

#: Packets of the milter protocol: length, letter, payload.
OPTNEG_REPLY = struct.pack("!IcIII", 13, b"O", 6, 0x20, 0x3FF)  # may quarantine; sees EOM only
QUARANTINE = struct.pack("!I", 6) + b"qtest\0"
CONTINUE = struct.pack("!I", 1) + b"c"


def stored(message: bytes) -> bytes:
    """The message as a mailbox holds it."""
    text = message.replace(b"\r\n", b"\n")
    return text if text.endswith(b"\n") else text + b"\n"


@contextmanager
def quarantining(listener: socket.socket) -> Iterator[list[bytes]]:
    """A milter for one connection that quarantines its mail; the value: the letters it was sent."""
    seen: list[bytes] = []

    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as mta, mta.makefile("rb") as packets:
            while head := packets.read(4):
                packet = packets.read(int.from_bytes(head, "big"))
                seen.append(packet[:1])
                if packet[:1] == b"O":
                    mta.sendall(OPTNEG_REPLY)
                elif packet[:1] == b"E":
                    mta.sendall(QUARANTINE + CONTINUE)

    listener.listen()
    listener.settimeout(10)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sendmail]:
    with Sendmail(tmp_path_factory.mktemp("plain")) as instance:
        yield instance


def test_two_mails_on_one_connection_are_delivered_byte_for_byte(plain: Sendmail) -> None:
    plain.clear()
    with plain.client() as client:
        answers = [
            submit(client, MESSAGE, recipients=["one@example.com", "two@example.net"]),
            submit(client, SECOND, sender="", recipients=["Three@Example.org"]),
        ]
    first, second = plain.wait_delivered(2)
    assert [(answer.stage, answer.code) for answer in answers] == [("eom", 250), ("eom", 250)]
    assert (first.sender, first.recipients) == (
        "sender@example.org",
        ("one@example.com", "two@example.net"),
    )
    assert first.raw.startswith(b"Received: from client.example.test (localhost [127.0.0.1])\n\t")
    assert first.message == stored(MESSAGE)
    assert (second.sender, second.recipients) == ("", ("Three@Example.org",))
    assert second.message == stored(SECOND)
    assert first.queue_id in answers[0].text
    assert second.queue_id in answers[1].text


def test_a_mail_is_delivered_before_it_is_acknowledged(plain: Sendmail) -> None:
    plain.clear()
    plain.send(MESSAGE)
    assert len(plain.deliveries()) == 1


def test_address_lists_are_the_headers_that_it_rewrites(plain: Sendmail) -> None:
    plain.clear()
    plain.send(b"To: a@b.example,c@d.example,\r\n  e@f.example\r\nBcc: g@h.example\r\n\r\n")
    [delivery] = plain.wait_delivered(1)
    assert delivery.message == b"To: a@b.example, c@d.example, e@f.example\n\n"


def test_recipients_without_a_domain_and_in_our_own_are_delivered_too(plain: Sendmail) -> None:
    plain.clear()
    plain.send(MESSAGE, recipients=["root", "root@mx.example.test", "root@[192.0.2.1]"])
    assert [delivery.recipients for delivery in plain.wait_delivered(1)] == [
        ("root", "root@mx.example.test", "root@[192.0.2.1]")
    ]


def test_clearing_forgets_mails_and_log(plain: Sendmail) -> None:
    answer = plain.send(MESSAGE)
    plain.wait_log(f"{answer.text.split()[1]}: done")
    plain.clear()
    assert plain.deliveries() == []
    assert plain.log() == ""


def test_a_missing_delivery_fails_with_the_log(plain: Sendmail) -> None:
    plain.clear()
    plain.send(MESSAGE)
    plain.wait_log("stat=Sent")
    with pytest.raises(pytest.fail.Exception, match=r"1 mails .* instead of 2[^$]*stat=Sent"):
        plain.wait_delivered(2, timeout=0.1)


@pytest.mark.parametrize("spelling", ["unix", "inet"])
def test_a_milter_that_is_not_there_is_a_temporary_failure(spelling: str, tmp_path: Path) -> None:
    nobody = f"unix:{tmp_path}/socket" if spelling == "unix" else f"inet:{free_port()}@127.0.0.1"
    with Sendmail(tmp_path / "mta", milter=nobody) as instance:
        answer = instance.send(MESSAGE)
        log = instance.wait_log("Milter (f): to error state")
        assert (answer.stage, answer.code) == ("mail", 451), f"{answer}\n{log}"
        assert instance.deliveries() == []


@pytest.mark.parametrize(("on_failure", "stage", "code"), [("", "eom", 250), ("R", "connect", 554)])
def test_what_a_missing_milter_means_is_the_callers_choice(
    on_failure: str, stage: str, code: int, tmp_path: Path
) -> None:
    nobody = f"inet:{free_port()}@127.0.0.1"
    with Sendmail(tmp_path / "mta", milter=nobody, on_failure=on_failure) as instance:
        answer = instance.send(MESSAGE)
    assert (answer.stage, answer.code) == (stage, code), f"{answer}\n{instance.log()}"


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_a_milter_is_asked_and_its_quarantine_is_readable(
    family: socket.AddressFamily, tmp_path: Path
) -> None:
    listener = socket.socket(family)
    if family == socket.AF_UNIX:
        listener.bind(f"{tmp_path}/socket")
        milter = f"unix:{tmp_path}/socket"
    else:
        listener.bind(("127.0.0.1", 0))
        milter = f"inet:{listener.getsockname()[1]}@127.0.0.1"
    mta = Sendmail(tmp_path / "mta", milter=milter)
    # The milter is left first: it waits for the MTA's Q, which a stopped MTA may not send any more.
    with listener, mta as instance, quarantining(listener) as seen:
        answer = instance.send(MESSAGE, recipients=["one@example.com", "two@example.net"])
        [held] = instance.wait_held(1)
        assert instance.deliveries() == []
    assert answer.code == 250, f"{answer}\n{instance.log()}"
    assert (held.sender, held.recipients) == (
        "sender@example.org",
        ("one@example.com", "two@example.net"),
    )
    assert held.message == stored(MESSAGE)
    assert b"".join(seen).replace(b"D", b"") == b"OEQ"


def test_more_mc_lines_are_more_configuration(tmp_path: Path) -> None:
    lines = ["define(`confSMTP_LOGIN_MSG', `$j of a test')dnl"]
    with (
        Sendmail(tmp_path / "mta", extra=lines) as instance,
        socket.create_connection(("127.0.0.1", instance.port), 10) as connection,
    ):
        assert connection.recv(100).startswith(b"220 mx.example.test ESMTP of a test")


def test_nothing_runs_or_stays_mounted_after_the_stop(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    mounts = Path("/proc/self/mountinfo").read_text()
    name = socket.gethostname()
    with Sendmail(tmp_path / "mta") as instance:
        client = instance.client()
        client.ehlo()  # a session is a process of its own
    with client, pytest.raises(smtplib.SMTPServerDisconnected):
        client.noop()
    assert psutil.Process().children(recursive=True) == before
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert socket.gethostname() == name


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    instance = Sendmail(tmp_path / "mta", extra=["LOCAL_CONFIG\nO NoSuchOption=1"])
    with pytest.raises(pytest.fail.Exception, match="NoSuchOption"):
        instance.start()
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_where_it_cannot_run_only_ci_fails(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(outcome, match="apt-get is not installed"):
        require_sendmail()
