"""The real `sharded-milter` as a process of its own, as an init system would run it."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import pytest

#: Starting is importing Twisted and the milter in every worker: seconds on a loaded machine.
READY_TIMEOUT = 60.0
#: `--graceful-timeout` is 30 s by default; a stop that takes much longer is a defect.
STOP_TIMEOUT = 45.0
#: A daemon that cannot start says so and ends.
REFUSAL_TIMEOUT = 90.0


#: The tests run as root in CI, and the only mail is theirs.
PROGRAM = ("-m", "sharded_milter", "--allow-root")


def command(
    *options: str, program: Sequence[str] = PROGRAM, python: str = sys.executable
) -> list[str]:
    return [python, *program, *options]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without the settings of a daemon that the caller may have."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("SHARDED_MILTER_")
    }
    return {**inherited, **(extra or {})}


class Daemon:
    """`with Daemon("./scan.py:milter", "--listen", "unix:/path", cwd=folder):`

    Inside the `with` it serves. Leaving it is SIGTERM, and the exit status must be 0.
    """

    def __init__(
        self,
        *options: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = PROGRAM,
        python: str = sys.executable,
    ) -> None:
        self.python = python
        self.program = program
        self.options = options
        self.cwd = cwd
        self.env = environment(env)
        self.stderr: int | None = None  # where its log goes, if that is not a file
        self._process: subprocess.Popen[bytes] | None = None
        self._log = cwd / f"daemon-{id(self):x}.stderr"

    # Life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def start(self, timeout: float = READY_TIMEOUT) -> None:
        """Returns when the daemon can serve; fails with its log when it does not come to that."""
        reading, writing = os.pipe()
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command(
                        "--ready-fd",
                        str(writing),
                        *self.options,
                        program=self.program,
                        python=self.python,
                    ),
                    cwd=self.cwd,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log if self.stderr is None else self.stderr,
                    pass_fds=[writing],
                )
            os.close(writing)
            writing = -1
            ready, _, _ = select.select([reading], [], [], timeout)
            if not ready or os.read(reading, 1) != b"\n":
                self.kill()
                pytest.fail(f"not ready within {timeout} s: {self.options}\n{self.log()}")
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """SIGTERM; the daemon ends with 0 and leaves no worker."""
        process = self.process
        family = self._family()
        process.terminate()
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the daemon still ran {timeout} s after SIGTERM\n{self.log()}")
        _, orphans = psutil.wait_procs(family, timeout=5)
        self._kill(orphans)
        self._process = None
        assert status == 0, f"exit status {status} after SIGTERM\n{self.log()}"
        assert orphans == [], f"processes outlived the daemon: {orphans}\n{self.log()}"

    def kill(self) -> None:
        """Whatever state it is in: afterwards neither it nor a child of it runs."""
        if self._process is None:
            return
        family = self._family()
        self._process.kill()
        self._process.wait()
        self._kill(family)
        self._process = None

    # What the tests look at

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the daemon is not running")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[int]:
        """The pids of the live worker processes."""
        alive = []
        for child in psutil.Process(self.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    alive.append(child.pid)
        return alive

    def memory(self) -> int:
        """Resident bytes of the master."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace") if self._log.exists() else ""

    def wait_log(self, text: str, timeout: float = 30.0) -> str:
        """The log, as soon as it contains `text`."""
        deadline = time.monotonic() + timeout
        while text not in (log := self.log()):
            if time.monotonic() > deadline:
                pytest.fail(f"{text!r} did not appear in the log within {timeout} s:\n{log}")
            time.sleep(0.02)
        return log

    # Inside

    def _family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    @staticmethod
    def _kill(processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(processes), timeout=5)


class Refusal:
    """A daemon that was expected not to start: its exit status and what it said."""

    def __init__(
        self,
        *options: str,
        cwd: Path,
        wrapper: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
        python: str = sys.executable,
    ) -> None:
        try:
            done = subprocess.run(
                [*wrapper, *command(*options, program=program, python=python)],
                cwd=cwd,
                env=environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=REFUSAL_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            said = (late.stderr or b"").decode(errors="replace")
            pytest.fail(f"still running after {REFUSAL_TIMEOUT} s: {options}\n{said}")
        self.options = options
        self.status = done.returncode
        self.stdout = done.stdout.decode("utf-8", "replace")
        self.stderr = done.stderr.decode("utf-8", "replace")

    def lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.strip()]

    def __str__(self) -> str:
        said = f"--- stderr\n{self.stderr}--- stdout\n{self.stdout}"
        return f"{' '.join(self.options)} ended with {self.status}\n{said}"
