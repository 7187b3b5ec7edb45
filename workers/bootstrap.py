"""The start of a worker process, before any of the author's code is imported.

`python -P -c 'from sharded_milter.workers.bootstrap import main; main(...)'` with the socket to
the master as descriptor 3.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .. import forks
from ..prctl import hide_memory, set_parent_death_signal

# The worker's end of the socket pair to the master.
CHANNEL = 3

# Only the master stops a worker, but a terminal's Ctrl-C and systemd's TERM go to the whole group.
# The signals have an empty handler; if they were ignored, programs that a milter executes would
# ignore them too.
_MASTER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(
    master: int,
    specs: Sequence[str],
    *,
    nice: int = 0,
    memory_limit: int = 0,
    cpus: Collection[int] = (),
    mark: int = 0,
    script: bool = False,
    open_files: int = 0,
    sandbox: Mapping[str, Any] | None = None,
) -> None:
    """Serve the milters `specs` to the process `master` until that exits or tells it to stop.

    With `script`, `specs` are a pymilter script and its arguments. `nice` is added to the
    niceness, `memory_limit` limits the address space in bytes (0: no limit), `cpus` are the CPUs
    to run on (empty: any), `open_files` is the soft limit of descriptors (0: the master's),
    `sandbox` has the arguments of `Sandbox`. `mark` (0: none) identifies the worker's descendants.
    """
    gc.disable()  # imports leave hardly any garbage, and collecting takes a tenth of their time
    _exit_with_master(master)
    hide_memory()  # from other workers: it will contain mail
    os.setsid()  # a process group of its own, which the master kills with the worker
    _restrict(nice, memory_limit, cpus, open_files, mark)
    forks.handle_in_parent_only(_MASTER_SIGNALS, _ignore_signal)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)

    if not script:
        # With the asyncio reactor, authors' coroutines can use both asyncio and Twisted. A script
        # has no coroutines, and may run an asyncio loop of its own in a callback.
        forks.install_asyncio_reactor()
    from twisted.internet import reactor

    if script:
        forks.guard_loop_of(reactor)

    from ..transports import PassingTransport

    _log_warnings()
    from .child import Child
    from .sandbox import Sandbox

    sandboxed_by = Sandbox(**(sandbox or {}))
    gc.freeze()
    gc.enable()  # before the author's code
    os.set_inheritable(CHANNEL, False)  # not for the milter's own children
    os.set_blocking(CHANNEL, False)

    def serve(child: Child) -> None:
        forks.run_in_children(child.after_fork)  # the milters, which this loads, may fork at once
        channel = socket.fromfd(CHANNEL, socket.AF_UNIX, socket.SOCK_STREAM)
        os.close(CHANNEL)
        PassingTransport.connect(channel, child, reactor)
        # The milters are loaded and the master has been told. Frozen objects are left out of
        # garbage collections, each of which would take as long as hundreds of messages. They are
        # still freed by reference counts, but not in cycles.
        gc.collect()
        gc.freeze()
        reactor.run(installSignalHandlers=False)  # type: ignore[call-arg]

    if not script:
        serve(Child(specs, sandbox=sandboxed_by))
        return
    from .pymilter_script import Script

    def halt(child: Child) -> None:
        reactor.callFromThread(child.stop)  # type: ignore[attr-defined]

    Script(specs[0], specs[1:], serve, halt, sandboxed_by).run()


def _ignore_signal(number: int, frame: object) -> None:
    """Do nothing about a signal that is meant for the master."""


def _log_warnings() -> None:
    """Write Twisted's warnings and errors to standard error, which goes to the master's log."""
    from twisted.logger import (
        FilteringLogObserver,
        LogLevel,
        LogLevelFilterPredicate,
        globalLogBeginner,
        textFileLogObserver,
    )

    predicate = LogLevelFilterPredicate(defaultLogLevel=LogLevel.warn)
    observer = FilteringLogObserver(textFileLogObserver(sys.stderr), [predicate])
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)


def _restrict(
    nice: int, memory_limit: int, cpus: Collection[int], open_files: int, mark: int
) -> None:
    os.nice(nice)
    if mark:
        resource.setrlimit(forks.MARKED_LIMIT, (mark, mark))
    if memory_limit:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    if open_files:
        # The master has raised its limit for its connections. A milter's programs may use
        # select(), which supports 1024 descriptors, or close every possible descriptor.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard))
    if cpus:
        os.sched_setaffinity(0, cpus)


def _exit_with_master(master: int) -> None:
    """Exit when the master does, in any way. Without Linux, only its closed socket says so."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != master:  # it exited before the line above
        os._exit(os.EX_TEMPFAIL)
