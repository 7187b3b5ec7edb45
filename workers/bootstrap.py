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

# The master's end of the socket pair is on the other side of this descriptor.
CHANNEL = 3

# The master alone decides when a worker ends: a terminal's Ctrl-C and systemd's TERM go to the
# whole group. They are not ignored, because what a milter executes would ignore them too.
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
    """Serves the milters `specs` to the process `master` until that ends or says so.

    With `script` they are a pymilter script and its arguments instead.
    `nice` is added to its priority, `memory_limit` bounds its address space in bytes (0: not),
    `cpus` are those it may run on (none: any), `open_files` is its soft limit of descriptors (0:
    the master's), `sandbox` the arguments of its `Sandbox`. By `mark` (0: none) the master knows
    what descends from it.
    """
    gc.disable()  # hardly anything is garbage until all is imported; looking takes a tenth of it
    _exit_with_master(master)
    hide_memory()  # from other workers: it is going to hold mail
    os.setsid()  # a process group of its own, which the master ends with the worker
    _restrict(nice, memory_limit, cpus, open_files, mark)
    forks.handle_in_parent_only(_MASTER_SIGNALS, _ignore_signal)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)

    if not script:
        # The asyncio reactor, so that coroutines of authors can use both asyncio and Twisted. A
        # script has none, and may want to run an asyncio loop of its own in a callback.
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
        # The milters are loaded and the master knows it. What is here now is not looked at again
        # by collections, each of which would take as long as hundreds of messages. It is freed all
        # the same when nobody needs it any more, but for cycles.
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
    """Nothing is done about the signal."""


def _log_warnings() -> None:
    """What Twisted has to say goes to standard error, which is the master's log."""
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
        # The master has raised it for its connections. What a milter starts may use select(), which
        # knows 1024 descriptors, or close all that it could have.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard))
    if cpus:
        os.sched_setaffinity(0, cpus)


def _exit_with_master(master: int) -> None:
    """No worker outlives its master, however that ends; Linux only, elsewhere EOF must do."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != master:  # it died before the line above
        os._exit(os.EX_TEMPFAIL)
