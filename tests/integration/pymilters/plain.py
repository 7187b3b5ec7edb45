"""The reference: a script on plain pymilter, as a process of its own, without any of our code."""

import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest

from ..daemon import environment

#: Importing the script and its libraries: seconds on a loaded machine.
LISTEN_TIMEOUT = 60.0
#: libmilter waits for open sessions, and looks for its end every 5 s at the latest.
STOP_TIMEOUT = 30.0


class Plain:
    """`with Plain(["/venv/bin/python", "script.py"], listen="unix:/path", cwd=folder):`

    Inside the `with` the script listens. Leaving it is SIGTERM for this one process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        listen: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.listen = listen
        self.cwd = cwd
        self.env = environment({"PYTHONUNBUFFERED": "1", **(env or {})})
        self._process: subprocess.Popen[bytes] | None = None
        self._log = cwd / f"plain-{id(self):x}.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the script is not running")
        return self._process.pid

    def start(self, timeout: float = LISTEN_TIMEOUT) -> None:
        """Returns when the script listens; fails with its log when it does not come to that."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0,  # Postfix's user has to write to the socket
            )
        deadline = time.monotonic() + timeout
        while not listens(self.listen):
            if self._process.poll() is not None or time.monotonic() > deadline:
                status = self._process.poll()
                self.kill()
                pytest.fail(f"does not listen (status {status}): {self.command}\n{self.log()}")
            time.sleep(0.05)

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """SIGTERM, and the exit status: libmilter catches it, so that runmilter() returns."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            status = self._wait_poked(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"still runs {timeout} s after SIGTERM: {self.command}\n{self.log()}")
        self._process = None
        return status

    def _wait_poked(self, timeout: float) -> int:
        """libmilter notices its end at the next connection, or after up to 5 s."""
        assert self._process is not None
        deadline = time.monotonic() + timeout
        while (status := self._process.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.command, timeout)
            time.sleep(0.05)
            listens(self.listen)
        return status

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def log(self) -> str:
        """What it wrote to its standard output and error."""
        return self._log.read_text("utf-8", "replace") if self._log.exists() else ""


def listens(address: str) -> bool:
    """True when somebody accepts connections on `unix:/path` or `inet:port@host`."""
    kind, _, place = address.partition(":")
    family, target = _target(kind, place)
    with socket.socket(family) as probe:
        try:
            probe.connect(target)
        except OSError:
            return False
    return True


def _target(kind: str, place: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    if kind in ("unix", "local"):
        return socket.AF_UNIX, place
    port, _, host = place.partition("@")
    return socket.AF_INET, (host or "127.0.0.1", int(port))
