"""Run the real daemon on a private socket for the duration of a block of code."""

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

# Seconds from SIGINT to SIGKILL. The daemon kills its workers at once; a milter in C first waits
# for its connections to end.
STOP_TIMEOUT = 5.0

# Signals that would end this process inside the block: from a service manager (TERM), or when the
# terminal is closed (HUP).
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

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
class Daemon:
    """A running daemon."""

    path: str  # of its socket; or HOST:PORT, as `load.connect` takes it
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """The process id of the master."""
        return self.process.pid

    def log_text(self, since: int = 0) -> str:
        """Return its log from byte `since` on."""
        with self.log.open("rb") as file:
            file.seek(since)
            return file.read().decode("utf-8", "replace")


@dataclass(frozen=True)
class Summary:
    """The log line about one message."""

    queue_id: str
    shard: str
    queue_ms: float
    scan_ms: float


def summaries(log: str) -> list[Summary]:
    """Return the summaries in a daemon's log, in order."""
    return [
        Summary(
            found["queue_id"], found["shard"], float(found["queue_ms"]), float(found["scan_ms"])
        )
        for found in _SUMMARY.finditer(log)
    ]


def answered_by_policy(log: str) -> list[str]:
    """Return the reason of each verdict that --on-error or --on-poison gave."""
    return [found["what"] for found in _BY_POLICY.finditer(log)]


def lost_workers(log: str) -> list[str]:
    """Return the reason of each death of a worker that had been ready."""
    return [found["why"] for found in _LOST.finditer(log)]


def workers(log: str) -> int:
    """Return the number of workers in the daemon's `ready` line; 0 if there is no such line."""
    found = _WORKERS.search(log)
    return int(found[1]) if found else 0


@contextmanager
def running(*arguments: str) -> Iterator[Daemon]:
    """Start the daemon with these arguments, and end it when the block is left.

    Raise a StartError with the daemon's message and exit code if it does not start.
    """
    with _signals_as_exceptions(), tempfile.TemporaryDirectory(prefix="sharded-milter-") as folder:
        path, log = f"{folder}/milter.sock", Path(folder, "log")
        reader, writer = os.pipe()
        # The environment may have settings of another daemon, for example its log level.
        options = ["--listen", f"unix:{path}", "--socket-group=", "--log-level=info"]
        # Other users cannot reach the socket, so all mail comes from the user who runs this.
        options.append("--allow-root")
        if os.geteuid():  # this process cannot become the user of a configuration file
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
                    start_new_session=True,  # Ctrl-C reaches this process only, and `stop` follows
                )
            finally:
                os.close(writer)
            try:
                if not ready.read(1):
                    _raise_start_error(process.wait(), log)
                yield Daemon(path, process, log)
            finally:
                stop(process)


def _raise_start_error(code: int, log: Path) -> NoReturn:
    *before, last = log.read_text(errors="replace").splitlines() or ["the daemon ended"]
    kind = _BY_CODE.get(code, StartError)
    raise kind(last.removeprefix("sharded-milter: "), "".join(f"{line}\n" for line in before))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGINT to the daemon, then SIGKILL to all processes that are left in its group."""
    process.send_signal(signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Turn _ENDING_SIGNALS into SystemExit inside the block, so that the daemon is ended too."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)  # the exit code that a shell gives for a signal

    # A signal that is ignored stays ignored, as nohup wants it.
    taken = [number for number in _ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
