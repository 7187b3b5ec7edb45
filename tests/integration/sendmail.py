"""A private Sendmail: unpacked, not installed; own configuration, queue, log and port.

Debian's sendmail conflicts with its postfix, and both are needed on one machine. So Debian's
packages are fetched with `apt-get download`, unpacked into a cache and run from there. The
machine's own mail system is neither read, started, stopped nor changed. What Sendmail delivers
goes through a mailer of our own into files, so a test can compare the bytes that a mailbox would
have got.

What the machine needs (CI installs it, after `apt-get update`, which the download needs too)::

    apt-get install -y m4 libdb5.3 libldap-2.5-0 libnsl2 libsasl2-2 libssl3
    apt-get install -y util-linux mount hostname

`sendmail-bin`, `sendmail-cf` and `libwrap0` are fetched, never installed. The library names are
those of Debian 12; where one is missing, the reason says which. Root is needed, and the right to
make namespaces (CAP_SYS_ADMIN; a plain Docker container lacks it). Sendmail gets a UTS and a
mount namespace of its own, because

- before it reads any configuration it sleeps 60 s when the machine's name has no dot;
- its name look-ups must not leave the machine: it needs its own hosts, nsswitch.conf, resolv.conf;
- it logs to /dev/log only, and that one must belong to the test.

The network namespace stays the caller's: client, Sendmail and milter share 127.0.0.1.

Facts about Sendmail that a test must know:

- A mail is delivered *before* the final 250 is sent (delivery mode `interactive`): no test waits.
- Address lists (`From`, `To`, `Cc`, `Reply-To` ...) get blanks after commas and are folded anew.
  `Bcc` is emptied or removed; `Return-Path`, `Full-Name` and `Content-Length` are removed, as are
  an empty `From`, `Date` or `Message-Id`; `Text` ends the header. A NUL is dropped from any field.
  No other field was seen to change, and nothing but `Received` is added to what is delivered.
- A bare CR in a header gets `421 4.5.0` and the connection is closed.
- A UNIX milter socket may have any mode, but when it exists in a directory that its group can
  write to, Sendmail does not start. A sticky directory is fine.
- A missing milter shows at MAIL (451 4.3.2) with `on_failure="T"`, in the greeting (554) with "R".
"""

import os
import platform
import re
import shlex
import shutil
import signal
import smtplib
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Self

import psutil
import pytest

from .machine import free_port, one_at_a_time
from .postfix import Answer, Delivery, HeldMail, submit

HOST = "mx.example.test"
PACKAGES = ("sendmail-bin", "sendmail-cf", "libwrap0")

#: Three packages of one megabyte together; a slower mirror is one that does not answer.
DOWNLOAD_TIMEOUT = 120.0
#: Sendmail listens 0.1 s after its start. A look-up that hangs costs 60 s and shall fail here.
START_TIMEOUT = 20.0
#: SIGTERM ends it at once; a session with a client in it may take a moment.
STOP_TIMEOUT = 5.0
#: One SMTP answer. Longer than the ten seconds that Sendmail gives a milter by default.
SMTP_TIMEOUT = 60.0
#: A mail that has been accepted is delivered within this time, or the test fails and shows the log.
DELIVERY_TIMEOUT = 60.0

#: Sendmail's own defaults, but one minute instead of five for the connection.
MILTER_TIMEOUTS = "C:1m;S:10s;R:10s;E:5m"

_SENDMAIL = "usr/libexec/sendmail/sendmail"
_CF = "usr/share/sendmail/cf"

_MC = """\
VERSIONID(`a private instance for tests')dnl
OSTYPE(`linux')dnl
define(`ALIAS_FILE', `')dnl
define(`QUEUE_DIR', `{directory}/queue')dnl
define(`STATUS_FILE', `{directory}/status')dnl
define(`HELP_FILE', `{directory}/help')dnl
define(`confPID_FILE', `{directory}/pid')dnl
define(`confSERVICE_SWITCH_FILE', `{directory}/service.switch')dnl
define(`confHOSTS_FILE', `{directory}/hosts')dnl
define(`confCR_FILE', `-o {directory}/relay-domains')dnl
define(`confDOMAIN_NAME', `{host}')dnl
define(`confDELIVERY_MODE', `interactive')dnl
define(`confSAFE_QUEUE', `interactive')dnl
define(`confDONT_BLAME_SENDMAIL', `TrustStickyBit')dnl
define(`confPRIVACY_FLAGS', `public')dnl
define(`confTO_IDENT', `0')dnl
define(`confDONT_PROBE_INTERFACES', `true')dnl
define(`confREFUSE_LA', `0')dnl
define(`confQUEUE_LA', `10000')dnl
define(`confMIN_FREE_BLOCKS', `0')dnl
define(`confBAD_RCPT_THROTTLE', `100')dnl
define(`confMAX_MESSAGE_SIZE', `51200000')dnl
define(`confLOG_LEVEL', `14')dnl
define(`confMILTER_LOG_LEVEL', `9')dnl
FEATURE(`nocanonify')dnl
FEATURE(`accept_unresolvable_domains')dnl
FEATURE(`accept_unqualified_senders')dnl
FEATURE(`no_default_msa')dnl
FEATURE(`delay_checks')dnl
DAEMON_OPTIONS(`Name=MTA, Family=inet, Addr=127.0.0.1, Port={port}, Listen=128, Modifiers=AS')dnl
{milter}
{extra}
MAILER(`local')dnl
MAILER(`smtp')dnl
MAILER_DEFINITIONS
Mcapture,	P={directory}/capture, F=nSmuh0, U=root:root, D={directory}, L=0, T=X-Unix,
		A=capture {directory}/mail $i $f $u
LOCAL_RULE_0
R$+ < @ $+ >	$#capture $@ capture $: $1 < @ $2 >
R$+		$#capture $@ capture $: $1
"""

#: The mailer: spool, queue id, sender, recipients; the message comes on standard input.
#: A delivery appears in `new` by one rename, so a reader never sees half of it.
_CAPTURE = """\
#!/bin/sh
set -eu
spool=$1
shift
work=$(mktemp -d "$spool/tmp/XXXXXXXXXX")
printf '%s\\0' "$@" >"$work/envelope"
cat >"$work/message"
mv "$work" "$spool/new/"
"""

#: Runs inside the new namespaces. Nothing it mounts or names is seen outside, and all is gone with
#: the last process.
_LAUNCH = """\
set -eu
hostname {host}
cd {directory}
for name in hosts nsswitch.conf resolv.conf; do
    if [ -e "/etc/$name" ]; then mount --bind "$name" "/etc/$name"; fi
done
for name in null zero random urandom; do mount --bind "/dev/$name" "dev/$name"; done
mount --rbind dev /dev
exec setpriv --pdeathsig KILL {sendmail} -bD -C {directory}/sendmail.cf
"""


def sendmail_is_missing() -> str | None:
    """Why no private Sendmail can run here; None when nothing is known that would prevent it."""
    if os.geteuid() != 0:
        return "a private Sendmail has to be started by root"
    for program in ("apt-get", "dpkg-deb", "m4", "unshare", "setpriv", "mount", "hostname"):
        if shutil.which(program) is None:
            return f"the program {program} is not installed"
    probe = ["unshare", "--mount", "--uts", "true"]
    done = subprocess.run(probe, capture_output=True, timeout=START_TIMEOUT, check=False)
    if done.returncode != 0:
        return f"no namespaces may be made: {done.stderr.decode(errors='replace').strip()}"
    return None


def require_sendmail() -> Path:
    """The unpacked packages. Where Sendmail cannot run: skip, in CI fail."""
    reason = sendmail_is_missing()
    if reason is not None:
        _unavailable(reason)
    root = _cache() / "root"
    with one_at_a_time(root.with_name("lock")):
        if not root.exists():
            _unpack(root)
    missing = _missing_libraries(root)
    if missing:
        _unavailable(f"Sendmail needs these libraries: {' '.join(missing)}")
    return root


class Sendmail:
    """A Sendmail of one's own, with at most one milter. More of anything comes as `extra` mc lines.

    `milter` is spelled as Sendmail does: `inet:8890@127.0.0.1` or `unix:/path`. `on_failure` is its
    `F=`: `T` tempfail, `R` reject, `4` close with 421, empty: go on as if there were no milter.
    `timeouts` is its `T=`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        milter: str | None = None,
        on_failure: str = "T",
        timeouts: str = MILTER_TIMEOUTS,
        extra: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.queue = directory / "queue"
        self.spool = directory / "mail"
        self.port = free_port()
        self._pid_file = directory / "pid"
        self._milter = _input_mail_filter(milter, on_failure, timeouts) if milter else "dnl"
        self._extra = tuple(extra)
        self._syslog: _Syslog | None = None
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    # Life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when its port is open; fails with its log when it does not come to that."""
        root = require_sendmail()
        self._write_configuration(root)
        try:
            self._syslog = _Syslog(self.directory / "dev", self.directory / "log")
            self._launch(root)
            self._wait_listening()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Nothing of this instance runs when this returns, even if it did not want to stop."""
        if self._process is not None:
            family = _family(self._process.pid)
            _signal(family, signal.SIGTERM)
            deadline = time.monotonic() + STOP_TIMEOUT
            while any(map(_runs, family)) and time.monotonic() < deadline:
                time.sleep(0.01)
            _signal(family, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._syslog is not None:
            self._syslog.close()
            self._syslog = None

    # What the tests look at

    def log(self) -> str:
        """What it has said to syslog and on standard error since the last `clear()`."""
        path = self.directory / "log"
        if not path.exists():
            return ""
        return path.read_bytes()[self._log_start :].decode("utf-8", "surrogateescape")

    def wait_log(self, text: str, timeout: float = DELIVERY_TIMEOUT) -> str:
        """The log, as soon as it contains `text`."""
        deadline = time.monotonic() + timeout
        while text not in (log := self.log()):
            if time.monotonic() > deadline:
                pytest.fail(f"{text!r} not in the log within {timeout} s:\n{log}")
            time.sleep(0.02)
        return log

    def deliveries(self) -> list[Delivery]:
        """What has been delivered since the last `clear()`, oldest first."""
        new = (self.spool / "new").iterdir()
        return [_read_delivery(folder) for folder in sorted(new, key=_age)]

    def wait_delivered(self, count: int, timeout: float = DELIVERY_TIMEOUT) -> list[Delivery]:
        """Exactly `count` deliveries, as soon as they are there."""
        deadline = time.monotonic() + timeout
        while len(os.listdir(self.spool / "new")) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        found = self.deliveries()
        if len(found) != count:
            pytest.fail(
                f"{len(found)} mails delivered instead of {count} (limit {timeout} s)."
                f" Log:\n{self.log()}"
            )
        return found

    def held(self) -> list[HeldMail]:
        """The quarantined mails, as they are queued: address lists are not rewritten yet."""
        return [_read_held(path) for path in sorted(self.queue.glob("hf*"), key=_age)]

    def wait_held(self, count: int, timeout: float = DELIVERY_TIMEOUT) -> list[HeldMail]:
        """Exactly `count` quarantined mails."""
        deadline = time.monotonic() + timeout
        while len(found := self.held()) != count:
            if time.monotonic() > deadline:
                pytest.fail(
                    f"{len(found)} mails in quarantine instead of {count} (limit {timeout} s)."
                    f" Log:\n{self.log()}"
                )
            time.sleep(0.02)
        return found

    def clear(self) -> None:
        """Forget all mail and log lines so far: the next test begins with an empty Sendmail."""
        for path in self.queue.iterdir():
            path.unlink()
        for folder in (self.spool / "new").iterdir():
            shutil.rmtree(folder)
        path = self.directory / "log"
        self._log_start = path.stat().st_size if path.exists() else 0

    # What the tests do

    def client(self) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.port, "client.example.test", SMTP_TIMEOUT)

    def send(
        self,
        message: bytes,
        *,
        sender: str = "sender@example.org",
        recipients: Sequence[str] = ("recipient@example.com",),
    ) -> Answer:
        """Hand over one mail on a connection of its own. The answer is returned, never raised."""
        try:
            client = self.client()
        except smtplib.SMTPConnectError as refusal:
            text = refusal.smtp_error
            text = text if isinstance(text, str) else text.decode("utf-8", "surrogateescape")
            return Answer("connect", refusal.smtp_code, text, {})
        with client:
            return submit(client, message, sender=sender, recipients=recipients)

    # Inside

    def _write_configuration(self, root: Path) -> None:
        here = self.directory
        for name in ("", "queue", "mail", "mail/tmp", "mail/new", "dev"):
            (here / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("null", "zero", "random", "urandom"):
            (here / "dev" / name).touch()
        files = {
            "hosts": f"127.0.0.1 localhost\n::1 localhost\n127.0.0.1 {HOST}\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
            "service.switch": "hosts files\naliases files\npasswd files\n",
            "resolv.conf": "",
            "status": "",
            "capture": _CAPTURE,
            "sendmail.mc": _MC.format(
                directory=here,
                host=HOST,
                port=self.port,
                milter=self._milter,
                extra="\n".join(self._extra),
            ),
            "launch": _LAUNCH.format(
                directory=shlex.quote(str(here)),
                host=HOST,
                sendmail=shlex.quote(str(root / _SENDMAIL)),
            ),
        }
        for name, text in files.items():
            (here / name).write_text(text)
            (here / name).chmod(0o644)
        (here / "capture").chmod(0o755)
        (here / "sendmail.cf").write_bytes(_m4(root, here / "sendmail.mc"))

    def _launch(self, root: Path) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "launch"],
                cwd=self.directory,
                env={**os.environ, "LD_LIBRARY_PATH": _library_path(root)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_listening(self) -> None:
        """Seen from outside: a connection would already be a session with the milter.

        The pid file says that the port is Sendmail's, /proc that it is open.
        """
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while not (self._pid_file.exists() and _is_open(self.port)):
            status = self._process.poll()
            if status is not None:
                pytest.fail(f"Sendmail ended with {status}:\n{self.log()}")
            if time.monotonic() > deadline:
                pytest.fail(f"Sendmail does not listen after {START_TIMEOUT} s:\n{self.log()}")
            time.sleep(0.01)


class _Syslog:
    """A /dev/log of our own: what is written to it is appended to a file.

    It needs a thread: the kernel keeps ten lines, and then Sendmail waits until somebody reads.
    """

    def __init__(self, directory: Path, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # A socket's name has room for 107 bytes, a test's directory may need more.
        folder = os.open(directory, os.O_PATH)
        try:
            self._socket.bind(f"/proc/self/fd/{folder}/log")
        except BaseException:
            self._socket.close()
            raise
        finally:
            os.close(folder)
        self._thread = threading.Thread(target=self._copy, name="syslog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _copy(self) -> None:
        with self._path.open("ab", buffering=0) as log:
            while line := self._socket.recv(65536):
                log.write(line.partition(b">")[2].rstrip(b"\n\0") + b"\n")


def _input_mail_filter(milter: str, on_failure: str, timeouts: str) -> str:
    flags = f"F={on_failure}, " if on_failure else ""
    return f"INPUT_MAIL_FILTER(`f', `S={milter}, {flags}T={timeouts}')dnl"


def _is_open(port: int) -> bool:
    """Whether something listens on this port of 127.0.0.1 (0A is LISTEN)."""
    socket_line = f" 0100007F:{port:04X} 00000000:0000 0A "
    return socket_line in Path("/proc/net/tcp").read_text()


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _read_delivery(folder: Path) -> Delivery:
    envelope = (folder / "envelope").read_text("utf-8", "surrogateescape")
    queue_id, sender, *recipients = envelope.split("\0")[:-1]
    return Delivery(queue_id, sender, tuple(recipients), (folder / "message").read_bytes())


def _read_held(path: Path) -> HeldMail:
    """A control file: one record per line, its kind in the first byte; folded lines go on."""
    queue_id = path.name[2:]
    sender, recipients, headers = "", [], b""
    for record in re.split(rb"\n(?![ \t])", path.read_bytes()):
        kind, value = record[:1], record[1:]
        if kind == b"S":
            sender = _address(value)
        elif kind == b"R":
            recipients.append(_address(value.partition(b":")[2]))
        elif kind == b"H" and value.startswith(b"??"):
            # `H?D?Date:` would be for mailers with flag D; ours has none of these.
            # A byte that could be taken for a macro's mark is queued with \xff before it.
            headers += re.sub(rb"\xff(.)", rb"\1", value[2:], flags=re.DOTALL) + b"\n"
    body = path.with_name(f"df{queue_id}").read_bytes()
    return HeldMail(queue_id, sender, tuple(recipients), headers + b"\n" + body)


def _address(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape").strip().removeprefix("<").removesuffix(">")


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        daemon = psutil.Process(pid)
        return [daemon, *daemon.children(recursive=True)]
    return []


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _m4(root: Path, mc: Path) -> bytes:
    tree = root / _CF
    done = subprocess.run(
        ["m4", "-I", f"{tree}/", f"{tree}/m4/cf.m4", str(mc)],
        capture_output=True,
        timeout=START_TIMEOUT,
        check=False,
    )
    if done.returncode != 0 or done.stderr:
        pytest.fail(f"m4 cannot make sendmail.cf: {done.stderr.decode(errors='replace')}")
    return done.stdout


# The packages


def _cache() -> Path:
    """One per user and per release: libraries of another Debian would not fit."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    release = platform.freedesktop_os_release()
    name = f"{release.get('ID', 'linux')}{release.get('VERSION_ID', '')}-{platform.machine()}"
    return Path(base) / "sharded-milter-tests" / f"sendmail-{name}"


def _unpack(root: Path) -> None:
    """All or nothing: `root` appears by one rename."""
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="new-") as name:
        work = Path(name)
        _fetch("apt-get", "-qq", "download", *PACKAGES, cwd=work)
        for package in sorted(work.glob("*.deb")):
            _fetch("dpkg-deb", "-x", str(package), "root", cwd=work)
        # A set-group-id program ignores LD_LIBRARY_PATH.
        (work / "root" / _SENDMAIL).chmod(0o755)
        (work / "root").rename(root)


def _fetch(*command: str, cwd: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, timeout=DOWNLOAD_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        _unavailable(f"{' '.join(command)} needs more than {DOWNLOAD_TIMEOUT} s")
    if done.returncode != 0:
        errors = done.stderr.decode(errors="replace").strip()
        _unavailable(f"{' '.join(command)} ended with {done.returncode}: {errors}")


def _library_path(root: Path) -> str:
    return os.pathsep.join(str(path) for path in sorted((root / "usr/lib").glob("*-linux-*")))


def _missing_libraries(root: Path) -> list[str]:
    done = subprocess.run(
        ["ldd", str(root / _SENDMAIL)],
        env={**os.environ, "LD_LIBRARY_PATH": _library_path(root)},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT,
        check=False,
    )
    return [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]


def _unavailable(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run the integration tests: {reason}")
    pytest.skip(reason)
