"""A worker process: how it is started, what it writes, and that it has ended.

Built on ampoule's starter and connector. The AMP connection runs over one inherited UNIX socket
pair instead of two pipes, so that descriptors can be passed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ampoule.main import AMPConnector, ProcessStarter
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

from sharded_milter.ipc.sending import read_now

# The worker must not find the operator's secrets in its environment, nor be steered by it.
PASSED_ENVIRONMENT = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "PATH",
    "PYTHONPATH",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
)

# Output of a dead worker that its descendants still hold open is read for this long.
OUTPUT_GRACE = 2.0

# The longest piece of a line of output that is kept while its end has not come.
MAX_LOG_LINE = 8192

# Reads of 8 KB from a pipe before other work goes on: it holds 64 KB.
MAX_CATCH_UP = 8

_OUTPUTS = (1, 2)
_CHANNEL = 3
_BOOTSTRAP = (
    "import sys; from sharded_milter.workers.bootstrap import main;"
    " main({}, sys.argv[1:], nice={!r}, memory_limit={!r}, cpus={!r}, script={!r})"
)


@dataclass(frozen=True)
class Workplace:
    """How every worker is started: the milters that it serves and what it may use.

    With `script` they are a pymilter script and its arguments. `cpus` are dealt out, one for each
    slot in turn; none leaves the workers where they like.
    """

    specs: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    nice: int = 0
    memory_limit: int = 0
    cpus: tuple[int, ...] = ()
    script: bool = False

    def bootstrap(self, slot: int) -> str:
        """The program that Python runs in the worker of a slot."""
        cpus = (self.cpus[(slot - 1) % len(self.cpus)],) if self.cpus else ()
        return _BOOTSTRAP.format(os.getpid(), self.nice, self.memory_limit, cpus, self.script)


class Owner(Protocol):
    """Who hears of a process: its shard."""

    slot: int

    def spawned(self, process: Any) -> None: ...
    def output(self, line: bytes) -> None: ...
    def exited(self, status: Failure) -> None: ...


class Starter(ProcessStarter):  # type: ignore[misc]  # ampoule is not typed
    """Spawns with a socket pair, a clean environment, and no module search in the cwd."""

    def start(self, protocol: Any, shard: Owner, reactor: Any) -> None:
        """Spawns a process for the shard, to which the master speaks `protocol`.

        Raises OSError when the system refuses; a process that is there already is killed then.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            connector = self.connectorFactory(protocol)
            process = reactor.spawnProcess(
                connector,
                sys.executable,
                [sys.executable, "-P", "-c", self.bootstrap, *self.args],
                env=self.env,
                childFDs={0: "w", 1: "r", 2: "r", _CHANNEL: theirs.fileno()},
            )
            shard.spawned(process)
            factory = Factory()
            factory.buildProtocol = lambda addr: protocol  # type: ignore[method-assign]
            try:
                reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, factory)
            except OSError:  # there was no descriptor left
                process.signalProcess(signal.SIGKILL)
                raise


class Connector(AMPConnector):  # type: ignore[misc]  # ampoule is not typed
    """The process's own side: its output and its exit. AMP rides on the socket."""

    def __init__(self, protocol: Any, shard: Owner, reactor: Any) -> None:
        super().__init__(protocol, shard.slot)
        self._shard = shard
        self._reactor = reactor
        self._pieces: dict[int, bytes] = {}

    def connectionMade(self) -> None:
        self.transport.closeStdin()

    def catch_up(self) -> None:
        """Takes what was written so far: it belongs to the job that was answered just now."""
        pipes = getattr(self.transport, "pipes", {})  # Twisted's own, by the child's number
        read_now([pipes[fd] for fd in _OUTPUTS if fd in pipes], MAX_CATCH_UP)

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        *lines, rest = (self._pieces.get(childFD, b"") + data).split(b"\n")
        if len(rest) > MAX_LOG_LINE:
            lines, rest = [*lines, rest], b""
        self._pieces[childFD] = rest
        for line in lines:
            self._shard.output(line[:MAX_LOG_LINE])

    def processExited(self, reason: Failure) -> None:
        for rest in filter(None, self._pieces.values()):
            self._shard.output(rest)
        self._pieces.clear()
        self._reactor.callLater(OUTPUT_GRACE, self.transport.loseConnection)
        self._shard.exited(reason)

    def processEnded(self, reason: Failure) -> None:
        """Comes when the pipes are closed too; nobody waits for that."""


def worker_environment(environ: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """What a worker finds in its environment: an allow-list of the master's, and `extra`."""
    kept = {name: environ[name] for name in PASSED_ENVIRONMENT if name in environ}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}
