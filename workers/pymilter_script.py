"""A pymilter script as the main program of a worker.

Its `milter` module is ours; its call of runmilter() runs the worker's loop, and returns when the
worker is told to stop. If the script fails before that, the master gets one line that says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..dialects.loader import Dialect
from ..dialects.pymilter.dialect import PymilterDialect
from ..dialects.pymilter.module import Registration
from ..errors import MilterLoadError
from .child import Child
from .daemon_calls import DaemonCalls
from .sandbox import NO_SANDBOX, Sandbox

# The directory of Debian's python3-milter, which is not in the path of a virtual environment.
DEBIANS = "/usr/lib/python3/dist-packages"

# Digits of the counter in uniqueID(), which follow the process id.
UNIQUE_DIGITS = 9


class Script:
    """A script and its arguments.

    `serve` runs the worker's loop, and `halt` stops it from any thread. The sandbox is entered
    when the loop begins.
    """

    def __init__(
        self,
        path: str,
        arguments: Sequence[str],
        serve: Callable[[Child], None],
        halt: Callable[[Child], None],
        sandbox: Sandbox = NO_SANDBOX,
    ) -> None:
        self._path = path
        self._file = os.path.abspath(path)  # also where the script changes the directory
        self._arguments = arguments
        self._serve = serve
        self._halt = halt
        self._sandbox = sandbox
        self._child: Child | None = None  # that answers jobs
        self._failure: MilterLoadError | None = None
        self._factories: list[Any] = []  # all factories that the script has set
        self._daemon_calls = DaemonCalls(self._say)
        self._registration = Registration()
        self._registration.loop = self._loop
        self._registration.halt = self._stop

    def run(self) -> None:
        """Run the script to its end; raise any exception that it raises after it has served."""
        try:
            self._prepare()
            with self._daemon_calls.active():
                self._play()
        except MilterLoadError as error:
            self._failure = self._failure or error
        if not self._served:
            failure = self._failure or self._wrong("has ended without calling Milter.runmilter()")
            self._serve(Child([self._file], _raising(failure)))

    @property
    def _served(self) -> bool:
        return self._child is not None

    def _stop(self) -> None:
        if self._child is not None:
            self._halt(self._child)

    def _play(self) -> None:
        try:
            runpy.run_path(self._path, run_name="__main__")
            _wait_for_threads(lambda: self._served)
        except SystemExit as end:
            if self._served:
                raise
            raise self._wrong(
                f"has called sys.exit({end.code!r}) before Milter.runmilter()", end
            ) from end
        except Exception as error:
            if self._served or isinstance(error, MilterLoadError):
                raise
            summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
            raise self._wrong(f"has raised {summary}", error) from error

    def _wrong(self, what: str, error: BaseException | None = None) -> MilterLoadError:
        details = "" if error is None else _own_traceback(error, self._path)
        return MilterLoadError(f"pymilter script {self._path} {what}", details)

    def _say(self, line: str) -> None:
        print(f"{self._path}: {line}", file=sys.stderr, flush=True)

    # Before the script

    def _prepare(self) -> None:
        if not os.path.isfile(self._path):
            raise MilterLoadError(f"pymilter script {self._path} does not exist")
        sys.modules["milter"] = self._registration.module()
        python_half = _python_half()
        self._watch(python_half)
        sys.argv = [self._path, *self._arguments]
        sys.path.insert(0, str(Path(self._path).resolve().parent))

    def _watch(self, python_half: ModuleType) -> None:
        """Record the factories that are set, and make uniqueID() unique among the workers."""
        vars(python_half)["_seq"] = os.getpid() * 10**UNIQUE_DIGITS
        factories = self._factories

        class Watched(ModuleType):
            def __setattr__(self, name: str, value: Any) -> None:
                if name == "factory" and not any(value is known for known in factories):
                    factories.append(value)
                super().__setattr__(name, value)

        python_half.__class__ = Watched

    # runmilter

    def _loop(self) -> None:
        try:
            if len(self._factories) > 1:
                names = " and ".join(repr(factory)[:80] for factory in self._factories)
                raise self._wrong(
                    f"has set Milter.factory to {names}; there is one factory for all connections"
                )
            dialect = self._dialect()
        except MilterLoadError as failure:
            self._failure = failure
            raise
        self._child = Child(
            [self._file], lambda _: dialect, self._registration.socket, self._sandbox
        )
        with self._daemon_calls.suspended():
            self._serve(self._child)
            dialect.close()

    def _dialect(self) -> PymilterDialect:
        try:
            return PymilterDialect(self._registration)
        except MilterLoadError as failure:
            text = f"pymilter script {self._path}: {failure}"
            raise MilterLoadError(text, failure.details) from failure


def _raising(failure: MilterLoadError) -> Callable[[str], Dialect]:
    def load(_: str) -> Dialect:
        raise failure

    return load


def _python_half() -> ModuleType:
    """Import and return pymilter's package `Milter`, which uses our module as its C half."""
    if importlib.util.find_spec("Milter") is None and os.path.isdir(f"{DEBIANS}/Milter"):
        sys.path.append(DEBIANS)
    try:
        return importlib.import_module("Milter")
    except ModuleNotFoundError as error:
        if error.name != "Milter":
            raise MilterLoadError(f"pymilter cannot be imported: {error}") from error
        raise MilterLoadError(
            "--pymilter needs pymilter's own Python half, which is not installed: `pip install"
            " pymilter`, or Debian's python3-milter, or its directory in PYTHONPATH"
        ) from None


def _wait_for_threads(served: Callable[[], bool]) -> None:
    """Wait for the script's threads, as Python does: one of them may call runmilter()."""
    for thread in threading.enumerate():
        while (
            thread is not threading.current_thread()
            and thread.is_alive()
            and not thread.daemon
            and not served()
        ):
            thread.join(0.1)


def _own_traceback(error: BaseException, path: str) -> str:
    """Return the traceback from the script's first frame on."""
    frames = traceback.extract_tb(error.__traceback__)
    starts = [n for n, frame in enumerate(frames) if frame.filename == path]
    own = frames[starts[0] :] if starts else []
    return "".join(traceback.format_list(own) + traceback.format_exception_only(error))
