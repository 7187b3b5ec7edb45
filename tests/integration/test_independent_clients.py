"""Milter clients that we did not write talk to the real daemon.

`miltertest` is the name of two of them: a Python library (PyPI) and OpenDKIM's interpreter of Lua
scripts (the Debian package). Both are test programs; neither shares a line with the other or us.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest

from .daemon import Daemon
from .mails import write_milter

pytestmark = pytest.mark.integration

TIMEOUT = 30.0

#: Does what the subject says.
OBEDIENT = """
    from sharded_milter import (
        Accept, AddHeader, AddRecipient, ChangeHeader, ChangeSender, DeleteHeader,
        DeleteRecipient, Discard, InsertHeader, Milter, Quarantine, Reject, ReplaceBody, TempFail,
    )

    VERDICTS = {
        "none": None,
        "accept": Accept(),
        "reject": Reject("no 100 %, thank you"),
        "tempfail": TempFail("not now"),
        "discard": Discard(),
        "quarantine": Accept(Quarantine("looks odd")),
        "change": Accept(
            AddHeader("X-Added", "at the end"),
            InsertHeader(0, "X-Top", "at the top"),
            ChangeHeader("Subject", 1, "changed"),
            DeleteHeader("X-Twice", 2),
            AddRecipient("<added@example.com>"),
            AddRecipient("<notified@example.com>", ("NOTIFY=NEVER",)),
            DeleteRecipient("<recipient@example.com>"),
            ChangeSender("<changed@example.org>", ("RET=HDRS",)),
            ReplaceBody(b"The new body.\\r\\n"),
        ),
    }
    milter = Milter("obedient")

    @milter.connect
    def connect(connection):
        return None

    @milter.rcpt
    def rcpt(recipient, envelope):
        if recipient.local == "ghost":
            return Reject(f"no such user: {recipient}", xcode="5.1.1")
        return None

    @milter.eom
    def eom(message):
        assert message.body == b"The body.\\r\\n" * 9000, len(message.body)
        return VERDICTS[message.headers["Subject"]]
"""
BODY = "The body.\r\n" * 9000

HEADERS = [("X-Twice", "one"), ("X-Twice", "two")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("clients")
    write_milter(folder, "obedient.py", OBEDIENT)
    path = folder / "socket"
    with Daemon("./obedient.py:milter", "--workers", "1", "--listen", f"unix:{path}", cwd=folder):
        yield path


def unavailable(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run the integration tests: {reason}")
    pytest.skip(reason)


# The Python one


class PythonClient:
    """One connection of PyPI's miltertest, which sends what was negotiated."""

    def __init__(self, path: Path) -> None:
        try:
            miltertest: Any = import_module("miltertest")
        except ImportError:
            unavailable("the Python package miltertest is not installed")
        self.constants: Any = miltertest.constants
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(str(path))
        self.connection: Any = miltertest.MilterConnection(self.socket)
        # So header values come without the blank behind the colon.
        offer = miltertest.constants.SMFI_V6_PROT & ~miltertest.constants.SMFIP_HDR_LEADSPC
        _, self.protocol = self.connection.optneg_mta(protocol=offer)

    def ask(self, command: str, no: str, no_reply: str, **fields: Any) -> tuple[str, Any]:
        """The answer; CONTINUE where none is due."""
        names = self.constants
        if self.protocol & getattr(names, f"SMFIP_NO{no}"):
            return names.SMFIR_CONTINUE, {}
        if self.protocol & getattr(names, f"SMFIP_NR_{no_reply}"):
            self.connection._send(command, **fields)
            return names.SMFIR_CONTINUE, {}
        answer: tuple[str, Any] = self.connection.send_get(command, **fields)
        return answer

    def message(self, subject: str) -> list[tuple[str, Any]]:
        """Everything that is answered to the end of a mail."""
        c = self.constants
        address = {"family": "4", "port": 25, "address": "192.0.2.1"}
        answers = [
            self.ask(c.SMFIC_CONNECT, "CONNECT", "CONN", hostname="client.example", **address),
            self.ask(c.SMFIC_HELO, "HELO", "HELO", helo="client.example"),
            *self.envelope(),
            self.ask(c.SMFIC_DATA, "DATA", "DATA"),
        ]
        for name, value in [*HEADERS, ("Subject", subject)]:
            answers.append(self.ask(c.SMFIC_HEADER, "HDRS", "HDR", name=name, value=value))
        answers.append(self.ask(c.SMFIC_EOH, "EOH", "EOH"))
        for start in range(0, len(BODY), c.MILTER_CHUNK_SIZE):
            chunk = BODY[start : start + c.MILTER_CHUNK_SIZE]
            answers.append(self.ask(c.SMFIC_BODY, "BODY", "BODY", buf=chunk))
        assert {letter for letter, _ in answers} == {c.SMFIR_CONTINUE}
        replies: list[tuple[str, Any]] = self.connection.send_eom()
        if replies[-1][0] == c.SMFIR_QUARANTINE:  # which it takes for a verdict
            replies.append(self.connection.recv())
        return replies

    def envelope(self) -> list[tuple[str, Any]]:
        c = self.constants
        return [
            self.ask(c.SMFIC_MAIL, "MAIL", "MAIL", args=["<sender@example.org>", "SIZE=100"]),
            self.ask(c.SMFIC_RCPT, "RCPT", "RCPT", args=["<recipient@example.com>"]),
        ]


@pytest.fixture
def python_client(server: Path) -> Iterator[PythonClient]:
    client = PythonClient(server)
    with client.socket:
        yield client


def refusal(code: str, text: str) -> tuple[str, dict[str, str]]:
    return "y", {"smtpcode": code, "space": " ", "text": text}


@pytest.mark.parametrize(
    ("subject", "replies"),
    [
        ("none", [("c", {})]),
        ("accept", [("a", {})]),
        ("discard", [("d", {})]),
        (
            "reject",
            [("y", {"smtpcode": "550", "space": " ", "text": "5.7.1 no 100 %%, thank you"})],
        ),
        ("tempfail", [("y", {"smtpcode": "451", "space": " ", "text": "4.7.1 not now"})]),
        ("quarantine", [("q", {"reason": "looks odd"}), ("a", {})]),
        (
            "change",
            [
                ("m", {"index": 1, "name": "Subject", "value": "changed"}),
                ("m", {"index": 2, "name": "X-Twice", "value": ""}),
                ("i", {"index": 0x7FFFFFFF, "name": "X-Added", "value": "at the end"}),
                ("i", {"index": 0, "name": "X-Top", "value": "at the top"}),
                ("+", {"rcpt": "<added@example.com>"}),
                ("2", {"rcpt": "<notified@example.com>", "args": ["NOTIFY=NEVER"]}),
                ("-", {"rcpt": "<recipient@example.com>"}),
                ("e", {"from": "<changed@example.org>", "args": ["RET=HDRS"]}),
                ("b", {"buf": "The new body.\r\n"}),
                ("a", {}),
            ],
        ),
    ],
)
def test_the_python_client_reads_every_verdict(
    python_client: PythonClient, subject: str, replies: list[tuple[str, Any]]
) -> None:
    assert python_client.message(subject) == replies


def test_the_python_client_reads_a_refused_recipient(python_client: PythonClient) -> None:
    c = python_client.constants
    address = {"family": "4", "port": 25, "address": "192.0.2.1"}
    python_client.ask(c.SMFIC_CONNECT, "CONNECT", "CONN", hostname="client.example", **address)
    python_client.envelope()
    answer = python_client.ask(c.SMFIC_RCPT, "RCPT", "RCPT", args=["<ghost@example.com>"])
    assert answer == refusal("550", "5.1.1 no such user: ghost@example.com")


# The Lua one

#: Sends one mail with the subject of `-D subject=...`, as far as it was negotiated.
MAIL = """
conn = mt.connect("unix:" .. path)
assert(conn, "no connection")
assert(mt.conninfo(conn, "client.example", "192.0.2.1") == nil)
assert(mt.getreply(conn) == SMFIR_CONTINUE)
assert(mt.helo(conn, "client.example") == nil)
assert(mt.mailfrom(conn, "<sender@example.org>", "SIZE=100") == nil)
assert(mt.rcptto(conn, "<recipient@example.com>") == nil)
assert(mt.getreply(conn) == SMFIR_CONTINUE)
if not mt.test_option(conn, SMFIP_NODATA) then assert(mt.data(conn) == nil) end
assert(mt.header(conn, "X-Twice", "one") == nil)
assert(mt.header(conn, "X-Twice", "two") == nil)
assert(mt.header(conn, "Subject", subject) == nil)
if not mt.test_option(conn, SMFIP_NOEOH) then assert(mt.eoh(conn) == nil) end
for _ = 1, 9 do assert(mt.bodystring(conn, string.rep("The body.\\r\\n", 1000)) == nil) end
assert(mt.eom(conn) == nil)
"""
#: A header's value brings the blank behind the colon along, as was negotiated. What this client
#: cannot check it has at least read: the changed sender, and the recipient with a parameter.
CHECKS = {
    "none": "assert(mt.getreply(conn) == SMFIR_CONTINUE)",
    "accept": "assert(mt.getreply(conn) == SMFIR_ACCEPT)",
    "discard": "assert(mt.getreply(conn) == SMFIR_DISCARD)",
    "reject": """
        assert(mt.getreply(conn) == SMFIR_REPLYCODE)
        assert(mt.eom_check(conn, MT_SMTPREPLY, "550", "5.7.1", "no 100 %%, thank you"))
    """,
    "tempfail": """
        assert(mt.getreply(conn) == SMFIR_REPLYCODE)
        assert(mt.eom_check(conn, MT_SMTPREPLY, "451", "4.7.1", "not now"))
    """,
    "quarantine": """
        assert(mt.getreply(conn) == SMFIR_ACCEPT)
        assert(mt.eom_check(conn, MT_QUARANTINE, "looks odd"))
    """,
    "change": """
        assert(mt.getreply(conn) == SMFIR_ACCEPT)
        assert(mt.eom_check(conn, MT_HDRCHANGE, "Subject", " changed"))
        assert(mt.eom_check(conn, MT_HDRDELETE, "X-Twice"))
        assert(mt.eom_check(conn, MT_HDRINSERT, "X-Top", " at the top", 0))
        assert(mt.eom_check(conn, MT_HDRINSERT, "X-Added", " at the end"))
        assert(mt.eom_check(conn, MT_RCPTADD, "<added@example.com>"))
        assert(mt.eom_check(conn, MT_RCPTDELETE, "<recipient@example.com>"))
        assert(mt.eom_check(conn, MT_BODYCHANGE, "The new body.\\r\\n"))
        assert(not mt.eom_check(conn, MT_QUARANTINE))
    """,
}
GHOST = """
conn = mt.connect("unix:" .. path)
assert(mt.conninfo(conn, "client.example", "192.0.2.1") == nil)
assert(mt.mailfrom(conn, "<sender@example.org>") == nil)
assert(mt.rcptto(conn, "<ghost@example.com>") == nil)
assert(mt.getreply(conn) == SMFIR_REPLYCODE)
assert(mt.rcptto(conn, "<recipient@example.com>") == nil)
assert(mt.getreply(conn) == SMFIR_CONTINUE)
mt.disconnect(conn)
"""


def run_lua(script: str, path: Path, subject: str = "") -> None:
    program = shutil.which("miltertest")
    if program is None:
        unavailable("Debian package miltertest is not installed")
    file = path.with_name("script.lua")
    file.write_text(script)
    done = subprocess.run(
        [program, "-D", f"path={path}", "-D", f"subject={subject}", "-s", str(file)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done


@pytest.mark.parametrize("subject", CHECKS)
def test_the_lua_client_reads_every_verdict(server: Path, subject: str) -> None:
    run_lua(MAIL + CHECKS[subject] + "\nmt.disconnect(conn)\n", server, subject)


def test_the_lua_client_reads_a_refused_recipient(server: Path) -> None:
    run_lua(GHOST, server)


def test_the_lua_client_can_fail(server: Path) -> None:
    """An assertion of a script that does not hold is seen here."""
    with pytest.raises(AssertionError, match="returncode=1"):
        run_lua(MAIL + CHECKS["reject"], server, "accept")
