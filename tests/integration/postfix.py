"""A private Postfix: own configuration, queue, data, log and port, all in one directory.

The machine's own instance is neither read, started, stopped nor changed: every Postfix command
here carries `-c` with our directory. What Postfix delivers goes through pipe(8) into files, so a
test can compare the bytes that a mailbox would have got.
"""

import json
import os
import re
import shutil
import signal
import smtplib
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import pytest

from .machine import free_port

#: One SMTP answer may take this long. Postfix gives a milter 300 s; no test needs a tenth of it.
SMTP_TIMEOUT = 60.0
#: An accepted mail is delivered within this time, or the test fails and shows the mail log.
DELIVERY_TIMEOUT = 60.0
#: Its own script gives `postfix stop` 5 s; what runs after this time is killed.
STOP_TIMEOUT = 15.0

#: Debian's directories of administrators' commands may be missing in the PATH of a plain shell.
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

#: The field that Postfix itself puts in, with its folded lines.
_RECEIVED = re.compile(rb"^Received: from [^\n]*\n(?:[ \t][^\n]*\n)*", re.MULTILINE)

_MAIN_CF = {
    "compatibility_level": "3.6",
    "inet_interfaces": "127.0.0.1",
    "inet_protocols": "ipv4",
    "myhostname": "mx.example.test",
    "mydestination": "",
    "mynetworks": "127.0.0.0/8",
    "alias_maps": "",
    "alias_database": "",
    "local_recipient_maps": "",
    "default_transport": "capture",
    "relay_transport": "capture",
    "local_transport": "capture",
    "virtual_transport": "capture",
    # The bytes of a mail stay as the client and the milters made them.
    "local_header_rewrite_clients": "",
    "append_dot_mydomain": "no",
    # No name is looked up in the network, nobody is told anything, nobody is made to wait.
    "disable_dns_lookups": "yes",
    "smtp_dns_support_level": "disabled",
    "notify_classes": "",
    "biff": "no",
    "in_flow_delay": "0",
    "smtpd_error_sleep_time": "0",
    "smtpd_client_connection_count_limit": "0",
    "smtpd_client_connection_rate_limit": "0",
    "message_size_limit": "51200000",
    "smtputf8_enable": "no",
    "enable_long_queue_ids": "yes",
    # A milter that does not answer is visible: 451 4.7.1 from Postfix, never a silent pass.
    "milter_default_action": "tempfail",
}

_MASTER_CF = """\
pickup     unix       n - n 60  1 pickup
cleanup    unix       n - n -   0 cleanup
qmgr       unix       n - n 300 1 qmgr
rewrite    unix       - - n -   - trivial-rewrite
bounce     unix       - - n -   0 bounce
defer      unix       - - n -   0 bounce
trace      unix       - - n -   0 bounce
error      unix       - - n -   - error
retry      unix       - - n -   - error
anvil      unix       - - n -   1 anvil
showq      unix       n - n -   - showq
postlog    unix-dgram n - n -   1 postlogd
"""

#: Called by pipe(8): spool, queue id, sender, recipients; the message comes on standard input.
#: A delivery appears in `new` by one rename, so a reader never sees half of it.
_CAPTURE = """\
#!/bin/sh
set -eu
umask 022
spool=$1
shift
work=$(mktemp -d "$spool/tmp/XXXXXXXXXX")
printf '%s\\0' "$@" >"$work/envelope"
cat >"$work/message"
mv "$work" "$spool/new/"
"""


def without_received(message: bytes) -> bytes:
    """The message without the `Received` field of this Postfix, which differs every time."""
    return _RECEIVED.sub(b"", message, count=1)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One delivery: envelope and message bytes (lines end in LF, as on any mailbox)."""

    queue_id: str
    sender: str
    recipients: tuple[str, ...]
    raw: bytes

    @property
    def message(self) -> bytes:
        """What was delivered, without Postfix's own `Received` field."""
        return without_received(self.raw)


@dataclass(frozen=True, slots=True)
class HeldMail:
    """One mail in the hold queue, as `postqueue` and `postcat` show it."""

    queue_id: str
    sender: str
    recipients: tuple[str, ...]
    raw: bytes

    @property
    def message(self) -> bytes:
        return without_received(self.raw)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a mail ended for the client: at which stage, with which code and text."""

    stage: str
    code: int
    text: str
    refused: Mapping[str, tuple[int, str]]

    def __str__(self) -> str:
        return f"{self.stage}: {self.code} {self.text}"


def postfix_is_missing() -> str | None:
    """Why no private Postfix can run here; None when it can."""
    if shutil.which("postfix", path=_SEARCH_PATH) is None:
        return "Debian package postfix is not installed"
    if os.geteuid() != 0:
        return "Postfix's master process has to be started by root"
    return None


def require_postfix() -> None:
    """Skip where Postfix cannot run, except in CI: there a missing MTA is a failure."""
    reason = postfix_is_missing()
    if reason is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run the integration tests: {reason}")
    pytest.skip(reason)


class Postfix:
    """A Postfix of one's own. `milters` are the `smtpd_milters` of its SMTP port.

    `services` names more SMTP ports of the same instance, each with its own milters: starting an
    instance takes longer than most tests. `settings` are main.cf lines that win over ours.
    """

    def __init__(
        self,
        directory: Path,
        *,
        milters: Sequence[str] = (),
        services: Mapping[str, Sequence[str]] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.config = directory / "config"
        self.queue = directory / "queue"
        self.data = directory / "data"
        self.logs = directory / "log"
        self.spool = directory / "mail"
        self._milters = {"": milters, **(services or {})}
        self._ports = {name: free_port() for name in self._milters}
        self._settings = dict(settings or {})
        self._log_start = 0
        self._master: psutil.Process | None = None

    @property
    def port(self) -> int:
        return self.port_of("")

    def port_of(self, service: str) -> int:
        return self._ports[service]

    # Life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Postfix's own start command: it returns when the ports are open."""
        self._write_configuration()
        try:
            self._run("postfix", "start")
            self._master = psutil.Process(self.master_pid())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Nothing of this instance runs when this returns, even if it did not want to stop."""
        family: list[psutil.Process] = []
        if self._master is not None:
            with suppress(psutil.NoSuchProcess):
                family = [self._master, *self._master.children(recursive=True)]
        self._run("postfix", "stop", check=False)
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(alive, timeout=STOP_TIMEOUT)
        self._master = None

    # What the tests look at

    def master_pid(self) -> int:
        return int((self.queue / "pid" / "master.pid").read_text().split()[0])

    def log(self) -> str:
        """The mail log since the last `clear()`."""
        path = self.logs / "mail.log"
        if not path.exists():
            return ""
        return path.read_bytes()[self._log_start :].decode("utf-8", "surrogateescape")

    def deliveries(self) -> list[Delivery]:
        """What has been delivered since the last `clear()`, oldest first."""
        folders = (self.spool / "new").iterdir()
        return [_read_delivery(folder) for folder in sorted(folders, key=_age)]

    def wait_delivered(self, count: int, timeout: float = DELIVERY_TIMEOUT) -> list[Delivery]:
        """Exactly `count` deliveries, as soon as the queue has nothing left to deliver."""
        new = self.spool / "new"
        deadline = time.monotonic() + timeout
        while len(os.listdir(new)) < count or self._is_delivering():
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        found = self.deliveries()
        if len(found) != count:
            problem = f"{len(found)} mails delivered instead of {count} (limit {timeout} s)"
            pytest.fail(f"{problem}. Mail log:\n{self.log()}")
        return found

    def wait_held(self, count: int, timeout: float = DELIVERY_TIMEOUT) -> list[HeldMail]:
        """Exactly `count` mails in the hold queue."""
        deadline = time.monotonic() + timeout
        while len(found := self.held()) != count:
            if time.monotonic() > deadline:
                problem = f"{len(found)} mails on hold instead of {count} (limit {timeout} s)"
                pytest.fail(f"{problem}. Mail log:\n{self.log()}")
            time.sleep(0.02)
        return found

    def held(self) -> list[HeldMail]:
        lines = self._run("postqueue", "-j").splitlines()
        entries = [json.loads(line) for line in lines]
        return [
            HeldMail(
                queue_id=entry["queue_id"],
                sender="" if entry["sender"] == "MAILER-DAEMON" else entry["sender"],
                recipients=tuple(recipient["address"] for recipient in entry["recipients"]),
                raw=self._run("postcat", "-hbq", entry["queue_id"]),
            )
            for entry in entries
            if entry["queue_name"] == "hold"
        ]

    def clear(self) -> None:
        """Forget all mail and log lines so far: the next test begins with an empty Postfix."""
        deadline = time.monotonic() + DELIVERY_TIMEOUT
        while self._is_delivering() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._run("postsuper", "-d", "ALL")
        for folder in (self.spool / "new").iterdir():
            shutil.rmtree(folder)
        path = self.logs / "mail.log"
        self._log_start = path.stat().st_size if path.exists() else 0

    # What the tests do

    def client(self, service: str = "") -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.port_of(service), "client.example.test", SMTP_TIMEOUT)

    def send(
        self,
        message: bytes,
        *,
        sender: str = "sender@example.org",
        recipients: Sequence[str] = ("recipient@example.com",),
        service: str = "",
    ) -> Answer:
        """Hand over one mail on a connection of its own. The answer is returned, never raised."""
        try:
            client = self.client(service)
        except smtplib.SMTPConnectError as refusal:
            return _answer("connect", (refusal.smtp_code, refusal.smtp_error))
        with client:
            return submit(client, message, sender=sender, recipients=recipients)

    # Inside

    def _write_configuration(self) -> None:
        for folder in (self.config, self.queue, self.data, self.logs, self.spool):
            folder.mkdir(parents=True)
            folder.chmod(0o755)
        shutil.chown(self.data, user="postfix")
        for name in ("tmp", "new"):
            (self.spool / name).mkdir()
            shutil.chown(self.spool / name, user="nobody")
        capture = self.config / "capture"
        capture.write_text(_CAPTURE)
        capture.chmod(0o755)
        settings = {
            **_MAIN_CF,
            "queue_directory": str(self.queue),
            "data_directory": str(self.data),
            "maillog_file": str(self.logs / "mail.log"),
            "maillog_file_prefixes": str(self.logs),
            "smtpd_milters": " ".join(self._milters[""]),
            **self._settings,
        }
        main = "".join(f"{name} = {value}\n" for name, value in settings.items())
        (self.config / "main.cf").write_text(main)
        services = self._smtp_services() + _MASTER_CF + self._capture_service(capture)
        (self.config / "master.cf").write_text(services)

    def _smtp_services(self) -> str:
        lines = []
        for name, milters in self._milters.items():
            lines.append(f"127.0.0.1:{self._ports[name]} inet n - n - - smtpd\n")
            if name:
                lines.append(f"  -o {{ smtpd_milters = {' '.join(milters)} }}\n")
        return "".join(lines)

    def _capture_service(self, capture: Path) -> str:
        arguments = f"{self.spool} ${{queue_id}} ${{sender}} ${{recipient}}"
        return (
            "capture    unix       - n n -   - pipe\n"
            f"  user=nobody null_sender= argv={capture} {arguments}\n"
        )

    def _is_delivering(self) -> bool:
        folders = (self.queue / "incoming", self.queue / "active")
        return any(files for folder in folders for _, _, files in os.walk(folder))

    def _run(self, command: str, *arguments: str, check: bool = True) -> bytes:
        program = shutil.which(command, path=_SEARCH_PATH) or command
        done = subprocess.run(
            [program, "-c", str(self.config), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SMTP_TIMEOUT,
            check=False,
        )
        if check and done.returncode != 0:
            errors = done.stderr.decode(errors="replace")
            problem = f"{command} {' '.join(arguments)} ended with {done.returncode}: {errors}"
            pytest.fail(f"{problem}\nMail log:\n{self.log()}")
        return done.stdout


def submit(
    client: smtplib.SMTP,
    message: bytes,
    *,
    sender: str = "sender@example.org",
    recipients: Sequence[str] = ("recipient@example.com",),
) -> Answer:
    """One mail on an open connection, which stays usable for the next one."""
    client.ehlo_or_helo_if_needed()
    reply = client.mail(sender)
    if reply[0] != 250:
        client.rset()
        return _answer("mail", reply)
    refused: dict[str, tuple[int, str]] = {}
    for recipient in recipients:
        reply = client.rcpt(recipient)
        if reply[0] != 250:
            refused[recipient] = (reply[0], _text(reply[1]))
    if len(refused) == len(recipients):
        client.rset()
        return _answer("rcpt", reply, refused)
    try:
        reply = client.data(message)
    except smtplib.SMTPDataError as refusal:
        client.rset()
        return _answer("data", (refusal.smtp_code, refusal.smtp_error), refused)
    return _answer("eom", reply, refused)


def _answer(
    stage: str, reply: tuple[int, bytes | str], refused: Mapping[str, tuple[int, str]] | None = None
) -> Answer:
    return Answer(stage, reply[0], _text(reply[1]), refused or {})


def _text(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode("utf-8", "surrogateescape")


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _read_delivery(folder: Path) -> Delivery:
    queue_id, sender, *recipients = (
        (folder / "envelope").read_text("utf-8", "surrogateescape").split("\0")[:-1]
    )
    return Delivery(queue_id, sender, tuple(recipients), (folder / "message").read_bytes())
