"""A shard: one worker process with its slot number, from start to exit.

    starting ──READY──▶ idle ⇄ busy ──▶ draining ──▶ gone
        └──────────┴──────┴──── killed ──────────────▶ gone

A draining shard still answers for the connections whose milters' objects it has, until they end.

A death is what the process's exit says, not a closed pipe, which a grandchild may hold open.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, Protocol

from ampoule import commands as ampoule_commands
from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from sharded_milter.errors import CallbackFailed, MilterLoadError, WorkerLost
from sharded_milter.ipc.channel import Asking
from sharded_milter.ipc.messages import LoadFailed, Question, Ready
from sharded_milter.pool.spawned import Connector, Starter, Workplace
from sharded_milter.protocol.negotiation import Manifest, Pinning
from sharded_milter.protocol.stages import STAGES
from sharded_milter.protocol.text import to_text

# A worker that was told to end gets this long.
EXIT_GRACE = 5.0

# A socket is closed a moment before the exit that explains it; a worker that has closed it and
# lives on is killed after this long.
SILENCE_GRACE = 1.0


class State(Enum):
    """Where a shard is in its life."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    LEAVING = "leaving"  # it was told to exit
    KILLED = "killed"
    GONE = "gone"


class Events(Protocol):
    """What a shard tells its owner."""

    def shard_ready(self, shard: Shard) -> None: ...
    def shard_answered(self, shard: Shard) -> None: ...
    def shard_idle(self, shard: Shard) -> None: ...
    def shard_deaf(self, shard: Shard) -> None: ...
    def shard_gone(self, shard: Shard) -> None: ...


class Shard:
    """One worker process; the owner hears of everything through `events`."""

    log = Logger()

    def __init__(self, slot: int, workplace: Workplace, reactor: Any, events: Events):
        self.slot = slot
        self.answered = 0
        self.sessions = 0  # connections whose milters' objects it has
        self.workplace = workplace
        self.state = State.STARTING
        self.manifests: tuple[Manifest, ...] = ()  # of its milters; none before READY
        self.socket = ""  # where its script wants to listen
        self.load_error: MilterLoadError | None = None
        self.killed_for = ""  # why, when it was us
        self.exit_reason = ""
        self.label: Callable[[], str] = str  # what it works on, or did last, for its log lines
        self.pid = 0
        self.process: Any = None
        self._reactor = reactor
        self._events = events
        self._amp: Any = None
        self._connector: Any = None
        self._asked = 0  # questions that it has not answered yet
        self._lingers = False  # it drains, and waits for its connections to end

    def __repr__(self) -> str:
        return f"shard {self.slot} (pid {self.pid})"

    def start(self) -> None:
        """Spawns the process; raises OSError when the system refuses."""
        place = self.workplace
        starter = Starter(
            bootstrap=place.bootstrap(self.slot), args=place.specs, env=dict(place.env)
        )
        starter.connectorFactory = self._connect
        self._amp = _Parent(self)
        starter.start(self._amp, self, self._reactor)

    def _connect(self, protocol: _Parent) -> Connector:
        connector = self._connector = Connector(protocol, self, self._reactor)
        return connector

    def spawned(self, process: Any) -> None:
        """There is a process, whatever becomes of it."""
        self.process, self.pid = process, process.pid

    def serves(self, milter: int, manifest: Manifest) -> bool:
        """Whether its milter of that number is the one with the manifest."""
        return self.manifests[milter : milter + 1] == (manifest,)

    def ask(self, question: Question) -> Any:
        """A Deferred of the reply packets.

        Fails with CallbackFailed when the milter raised, with WorkerLost when the worker died.
        The worker answers in order, one question after the other, whoever waits.
        """
        self._asked += 1
        if self.state is State.IDLE:
            self.state = State.BUSY
        answer: Deferred[Any] = self._amp.ask(question)
        answer.addCallbacks(self._answered, self._lost)
        return answer

    def _answered(self, answer: tuple[bytes, bytes]) -> bytes:
        replies, error = answer
        self.answered += 1
        self._asked -= 1
        self._connector.catch_up()
        self._events.shard_answered(self)
        if self.state is State.BUSY and not self._asked:
            self.state = State.IDLE
        lingers = self.state is State.DRAINING and self._lingers and not self._asked
        if self.state is State.IDLE or lingers:
            self._events.shard_idle(self)
        else:
            self._end_if_drained()
        if error:
            raise CallbackFailed(to_text(error))
        return replies

    def _lost(self, failure: Failure) -> None:
        if self.state is not State.GONE:  # it lives, but nobody knows what it is doing
            self.kill(f"it could not be asked: {failure.getErrorMessage()}")
        raise WorkerLost(self.exit_reason or str(failure.value)) from failure.value

    def drain(self, linger: float = 0.0) -> None:
        """Takes no more jobs but those of its connections; exits when those have ended.

        They get `linger` seconds for that. What it does now it finishes in any case.
        """
        if self.state not in (State.STARTING, State.IDLE, State.BUSY):
            return
        self.state = State.DRAINING
        if self.sessions and linger:
            self._lingers = True
            self._reactor.callLater(linger, self._linger_no_more)
        self._end_if_drained()

    def _linger_no_more(self) -> None:
        self._lingers = False
        self._end_if_drained()

    def session_over(self) -> None:
        """A connection whose milter's object it has had is over."""
        self.sessions -= 1
        if not self.sessions:
            self._linger_no_more()

    def _end_if_drained(self) -> None:
        if self.state is State.DRAINING and not self._asked and not self._lingers:
            self.state = State.LEAVING
            if self.sessions:
                self._events.shard_deaf(self)
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
        import psutil  # here and below, because workers are started sooner without it

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
        import psutil

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
        if self.manifests:  # earlier, the signal would end it
            self.signal(signal.SIGUSR1)

    def signal(self, number: int) -> None:
        """Sends a signal, unless the process is gone."""
        try:
            self.process.signalProcess(number)
        except error.ProcessExitedAlready:
            return

    def ready(self, *manifests: Manifest) -> None:
        """The worker has imported the milters."""
        if self.state is State.STARTING:
            self.manifests = manifests
            self.state = State.IDLE
            self._events.shard_ready(self)

    def output(self, line: bytes) -> None:
        """A line that the worker wrote."""
        about = " ".join(filter(None, [str(self.slot), self.label()]))
        self.log.info("[{about}] {line}", about=about, line=to_text(line))

    def exited(self, status: Failure) -> None:
        """The process is reaped."""
        self.exit_reason = self.killed_for or _exit_reason(status)
        self.state = State.GONE
        self._end_family()
        self._events.shard_deaf(self)  # nothing more is for it, whatever it has answered
        self._amp.catch_up()
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


class _Parent(Asking):
    """The master's end of the AMP connection to one worker."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard._reactor)
        self._shard = shard
        self._impatience: Callable[[], None] | None = None

    @Ready.responder
    def ready(self, milters: list[dict[str, bytes]], socket: bytes) -> dict[str, Any]:
        self._shard.socket = to_text(socket)
        self._shard.ready(*map(_manifest, milters))
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
        self.hopeless(reason)
        transport: Any = self.transport
        if transport is not None:
            transport.abortConnection()


def _manifest(milter: Mapping[str, bytes]) -> Manifest:
    return Manifest.from_packet(
        to_text(milter["name"]),
        milter["negotiation"],
        frozenset(STAGES[letter] for letter in milter["light"]),
        to_text(milter["shard_by"]),
        Pinning(to_text(milter["pinning"])),
    )
