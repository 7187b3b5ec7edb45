"""The real daemon on a private socket, for as long as a block of code needs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sharded_milter.errors import (
    ConfigError,
    NotPermitted,
    SocketTaken,
    StartError,
    SystemRefused,
    UsageError,
)

# A server on this machine that has not ended by then hangs; workers are killed at once, and a
# milter in C waits for its connections to end.
STOP_TIMEOUT = 5.0

# What would end us without leaving the block: a service manager, and a terminal that is closed.
_ENDED_BY = (signal.SIGTERM, signal.SIGHUP)

_BY_CODE = {
    kind.exit_code: kind
    for kind in (UsageError, SocketTaken, SystemRefused, NotPermitted, ConfigError)
}

_SUMMARY = re.compile(
    r" qid=(?P<queue_id>\S+) size=\d+ verdict=\S+ actions=\d+ shard=(?P<shard>\S*)"
    r" queue_ms=(?P<queue_ms>[\d.]+) scan_ms=(?P<scan_ms>[\d.]+)"
)
_LOST = re.compile(r"^\S+ error shard \d+ is gone: (?P<why>.*)$", re.MULTILINE)
_WORKERS = re.compile(r" ready with (\d+) workers")
_BY_POLICY = re.compile(r" error (?P<what>.*); answered by policy$", re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """A running server."""

    path: str  # or HOST:PORT: what a load client takes
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Of the master."""
        return self.process.pid

    def said(self, since: int = 0) -> str:
        """Its log from a place on, which is a length of what it had said before."""
        with self.log.open("rb") as file:
            file.seek(since)
            return file.read().decode("utf-8", "replace")


@dataclass(frozen=True)
class Summary:
    """The log line of a message."""

    queue_id: str
    shard: str
    queue_ms: float
    scan_ms: float


def summaries(log: str) -> list[Summary]:
    """Those of a daemon's log, in order."""
    return [
        Summary(
            found["queue_id"], found["shard"], float(found["queue_ms"]), float(found["scan_ms"])
        )
        for found in _SUMMARY.finditer(log)
    ]


def answered_by_policy(log: str) -> list[str]:
    """Why the daemon had to answer in the milter's place, each time that it had to."""
    return [found["what"] for found in _BY_POLICY.finditer(log)]


def lost_workers(log: str) -> list[str]:
    """Why workers died that served, for each of them."""
    return [found["why"] for found in _LOST.finditer(log)]


def workers(log: str) -> int:
    """How many the daemon was to have when it began to serve; 0 where it needs none."""
    found = _WORKERS.search(log)
    return int(found[1]) if found else 0


@contextmanager
def running(*arguments: str) -> Iterator[Server]:
    """The daemon with these arguments, serving; it is gone when the block is left, however.

    Raises a StartError with the daemon's own words and exit code when it does not start.
    """
    with _signals_leave(), tempfile.TemporaryDirectory(prefix="sharded-milter-") as folder:
        path, log = f"{folder}/milter.sock", Path(folder, "log")
        reader, writer = os.pipe()
        # The environment may have settings of another daemon, the log level among them.
        options = ["--listen", f"unix:{path}", "--socket-group=", "--log-level=info"]
        # Nobody else can reach the socket, so the only mail is that of the user who runs us.
        options.append("--allow-root")
        if os.geteuid():  # who cannot become the user of a configuration file
            options += ["--user=", "--group="]
        options += [f"--allowed-peers=user:{os.geteuid()}"]
        command = [sys.executable, "-P", "-m", "sharded_milter", *options, "--ready-fd"]
        with open(reader, "rb") as ready, log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    [*command, str(writer), *arguments],
                    pass_fds=(writer,),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={name: os.environ[name] for name in os.environ if name != "JOURNAL_STREAM"},
                    start_new_session=True,  # a terminal's Ctrl-C is for us to pass on
                )
            finally:
                os.close(writer)
            try:
                if not ready.read(1):
                    _refused(process.wait(), log)
                yield Server(path, process, log)
            finally:
                stop(process)


def _refused(code: int, log: Path) -> NoReturn:
    *before, last = log.read_text(errors="replace").splitlines() or ["the server ended"]
    kind = _BY_CODE.get(code, StartError)
    raise kind(last.removeprefix("sharded-milter: "), "".join(f"{line}\n" for line in before))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends it politely, then whatever is left in its session, also when that is interrupted."""
    process.send_signal(signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _signals_leave() -> Iterator[None]:
    """Within the block a signal that ends us is an exception, so that nothing is left behind."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)  # as the shell says it

    # What is ignored stays so: that is what nohup is for.
    taken = [number for number in _ENDED_BY if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
