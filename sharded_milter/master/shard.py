"""A shard: one worker process with its slot number, from start to exit.

    starting ──READY──▶ idle ⇄ busy ──▶ draining ──▶ gone
        └──────────┴──────┴──── killed ──────────────▶ gone

Built on ampoule's starter, connector and child. The AMP connection runs over one inherited UNIX
socket pair instead of two pipes, so that descriptors can be passed; a death is what
`processExited` says, not a closed pipe, which a grandchild may hold open.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import psutil
from ampoule import commands as ampoule_commands
from ampoule.main import AMPConnector, ProcessStarter
from twisted.internet import error
from twisted.internet.defer import maybeDeferred
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.protocols import amp
from twisted.python.failure import Failure

from sharded_milter.errors import CallbackFailed, MilterLoadError, WorkerLost
from sharded_milter.jobs import Ask, LoadFailed, Memory, Ready, release
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import STAGES, Stage
from sharded_milter.protocol.text import to_text

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

# A worker that was told to end gets this long.
EXIT_GRACE = 5.0

# A socket is closed a moment before the exit that explains it; a worker that has closed it and
# lives on is killed after this long.
SILENCE_GRACE = 1.0

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
    " main({}, sys.argv[1], nice={!r}, memory_limit={!r}, cpus={!r})"
)


@dataclass(frozen=True)
class Workplace:
    """How every worker is started: what it serves and what it may use.

    `cpus` are dealt out, one for each slot in turn; none leaves the workers where they like.
    """

    spec: str
    env: Mapping[str, str] = field(default_factory=dict)
    nice: int = 0
    memory_limit: int = 0
    cpus: tuple[int, ...] = ()

    def bootstrap(self, slot: int) -> str:
        """The program that Python runs in the worker of a slot."""
        cpus = (self.cpus[(slot - 1) % len(self.cpus)],) if self.cpus else ()
        return _BOOTSTRAP.format(os.getpid(), self.nice, self.memory_limit, cpus)


class State(Enum):
    """Where a shard is in its life."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    KILLED = "killed"
    GONE = "gone"


class Events(Protocol):
    """What a shard tells its owner."""

    def shard_ready(self, shard: Shard) -> None: ...
    def shard_idle(self, shard: Shard) -> None: ...
    def shard_deaf(self, shard: Shard) -> None: ...
    def shard_gone(self, shard: Shard) -> None: ...


class Shard:
    """One worker process; the owner hears of everything through `events`."""

    log = Logger()

    def __init__(self, slot: int, workplace: Workplace, reactor: Any, events: Events):
        self.slot = slot
        self.answered = 0
        self.workplace = workplace
        self.state = State.STARTING
        self.manifest: Manifest | None = None
        self.load_error: MilterLoadError | None = None
        self.killed_for = ""  # why, when it was us
        self.exit_reason = ""
        self.label = ""  # what it works on, or did last, for its log lines
        self.pid = 0
        self.process: Any = None
        self._reactor = reactor
        self._events = events
        self._amp: Any = None
        self._connector: Any = None

    def __repr__(self) -> str:
        return f"shard {self.slot} (pid {self.pid})"

    def start(self) -> None:
        """Spawns the process; raises OSError when the system refuses."""
        place = self.workplace
        starter = _Starter(
            bootstrap=place.bootstrap(self.slot), args=(place.spec,), env=dict(place.env)
        )
        starter.connectorFactory = self._connect
        self._amp = _Parent(self)
        starter.start(self, self._amp, self._reactor)
        self.pid = self.process.pid

    def _connect(self, protocol: _Parent) -> _Connector:
        connector = self._connector = _Connector(protocol, self)
        return connector

    def ask(self, stage: Stage, connection: bytes | Memory, message: bytes | Memory) -> Any:
        """A Deferred of the reply packets.

        Fails with CallbackFailed when the milter raised, with WorkerLost when the worker died.
        The shard must be idle; it is idle again when the worker has answered, whoever waits.
        """
        self.state = State.BUSY
        answer = maybeDeferred(
            self._amp.callRemote, Ask, stage=stage.value, connection=connection, message=message
        )
        answer.addCallbacks(self._answered, self._lost)
        return answer

    def _answered(self, answer: dict[str, Any]) -> bytes:
        self.answered += 1
        self._connector.catch_up()
        replies = bytes(answer["replies"])
        release(answer["replies"])
        if self.state is State.BUSY:
            self.state = State.IDLE
            self._events.shard_idle(self)
        elif self.state is State.DRAINING:
            self._shut_down()
        if answer["error"]:
            raise CallbackFailed(to_text(answer["error"]))
        return replies

    def _lost(self, failure: Failure) -> None:
        if self.state is not State.GONE:  # it lives, but nobody knows what it is doing
            self.kill(f"it could not be asked: {failure.getErrorMessage()}")
        raise WorkerLost(self.exit_reason or str(failure.value)) from failure.value

    def drain(self) -> None:
        """Takes no more jobs; exits when the present one is answered."""
        if self.state is State.BUSY:
            self.state = State.DRAINING
        elif self.state in (State.STARTING, State.IDLE):
            self.state = State.DRAINING
            self._shut_down()

    def _shut_down(self) -> None:
        self._reactor.callLater(EXIT_GRACE, self.kill, "it did not end when it was told to")
        done = self._amp.callRemote(ampoule_commands.Shutdown)
        done.addCallbacks(lambda _: self._amp.transport.loseConnection(), lambda _: None)

    def kill(self, reason: str) -> None:
        """Ends the process and all its descendants at once."""
        if self.state is State.GONE:
            return
        self.state = State.KILLED
        self.killed_for = self.killed_for or reason
        try:
            family = psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            family = []
        self.signal(signal.SIGKILL)
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                continue

    def rss(self) -> int:
        """The bytes of memory that the process has resident; 0 when it is gone."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def _end_family(self) -> None:
        """Ends what the dead worker has left running; its group bears its process id."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def dump_stacks(self) -> None:
        """Has the worker write the Python stacks of all its threads into the log."""
        if self.manifest is not None:  # earlier, the signal would end it
            self.signal(signal.SIGUSR1)

    def signal(self, number: int) -> None:
        """Sends a signal, unless the process is gone."""
        try:
            self.process.signalProcess(number)
        except error.ProcessExitedAlready:
            return

    def ready(self, manifest: Manifest) -> None:
        """The worker has imported the milter."""
        if self.state is State.STARTING:
            self.manifest = manifest
            self.state = State.IDLE
            self._events.shard_ready(self)

    def output(self, line: bytes) -> None:
        """A line that the worker wrote."""
        about = f" {self.label}" if self.label else ""
        self.log.info("[{slot}{about}] {line}", slot=self.slot, about=about, line=to_text(line))

    def exited(self, status: Failure) -> None:
        """The process is reaped."""
        self.exit_reason = self.killed_for or _exit_reason(status)
        self.state = State.GONE
        self._end_family()
        self._amp.process_gone(Failure(WorkerLost(self.exit_reason)))
        self._events.shard_gone(self)


def _exit_reason(status: Failure) -> str:
    value = status.value
    number = getattr(value, "signal", None)
    if number:
        hint = ", perhaps out of memory" if number == signal.SIGKILL else ""
        return f"killed by {_signal_name(number)}{hint}"
    return f"exited with code {getattr(value, 'exitCode', 0) or 0}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


class _Starter(ProcessStarter):  # type: ignore[misc]  # ampoule is not typed
    """Spawns with a socket pair, a clean environment, and no module search in the cwd."""

    def start(self, shard: Shard, protocol: _Parent, reactor: Any) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            connector = self.connectorFactory(protocol)
            shard.process = reactor.spawnProcess(
                connector,
                sys.executable,
                [sys.executable, "-P", "-c", self.bootstrap, *self.args],
                env=self.env,
                childFDs={0: "w", 1: "r", 2: "r", _CHANNEL: theirs.fileno()},
            )
            factory = Factory()
            factory.buildProtocol = lambda addr: protocol  # type: ignore[method-assign]
            try:
                reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, factory)
            except OSError:  # there was no descriptor left
                shard.signal(signal.SIGKILL)
                raise


class _Connector(AMPConnector):  # type: ignore[misc]  # ampoule is not typed
    """The process's own side: its output and its exit. AMP rides on the socket."""

    def __init__(self, protocol: _Parent, shard: Shard) -> None:
        super().__init__(protocol, shard.slot)
        self._shard = shard
        self._pieces: dict[int, bytes] = {}
        self._said_more = False

    def connectionMade(self) -> None:
        self.transport.closeStdin()

    def catch_up(self) -> None:
        """Takes what was written so far: it belongs to the job that was answered just now."""
        pipes = getattr(self.transport, "pipes", {})  # Twisted's own, by the child's number
        for pipe in [pipes[fd] for fd in _OUTPUTS if fd in pipes]:
            for _ in range(MAX_CATCH_UP):
                self._said_more = False
                pipe.doRead()
                if not self._said_more:
                    break

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._said_more = True
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
        self._shard._reactor.callLater(OUTPUT_GRACE, self.transport.loseConnection)
        self._shard.exited(reason)

    def processEnded(self, reason: Failure) -> None:
        """Comes when the pipes are closed too; nobody waits for that."""


class _Parent(amp.AMP):
    """The master's end of the AMP connection to one worker."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self._shard = shard
        self._impatience: Callable[[], None] | None = None

    @Ready.responder
    def ready(
        self, name: bytes, negotiation: bytes, light: bytes, shard_by: bytes
    ) -> dict[str, Any]:
        manifest = Manifest.from_packet(
            to_text(name),
            negotiation,
            frozenset(STAGES[letter] for letter in light),
            to_text(shard_by),
        )
        self._shard.ready(manifest)
        return {}

    @LoadFailed.responder
    def load_failed(self, reason: bytes, details: bytes) -> dict[str, Any]:
        self._shard.load_error = MilterLoadError(to_text(reason), to_text(details))
        self._shard.drain()
        return {}

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The socket is closed: the exit that follows says why, so calls fail only then."""
        shard = self._shard
        if shard.state is not State.GONE:
            shard._events.shard_deaf(shard)
            call = shard._reactor.callLater(SILENCE_GRACE, shard.kill, "its socket was closed")
            self._impatience = call.cancel

    def process_gone(self, reason: Failure) -> None:
        if self._impatience is not None:
            with suppress(error.AlreadyCalled, error.AlreadyCancelled):
                self._impatience()
            self._impatience = None
        super().connectionLost(reason)
        transport: Any = self.transport
        if transport is not None:
            transport.abortConnection()


def worker_environment(environ: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """What a worker finds in its environment: an allow-list of the master's, and `extra`."""
    kept = {name: environ[name] for name in PASSED_ENVIRONMENT if name in environ}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}
