"""A shard: one process that answers jobs, and its state machine.

    starting ──▶ serving ──▶ draining ──▶ exiting ──▶ gone
        └────────────┴───────────┴───── killed ────────▶┘

The law: one constant table, TRANSITIONS, has a cell for each event in each state, late events
included. The state is assigned in `_handle_event` and nowhere else; so the table and its actions
stay in this one file, though it is long. The load of a shard is not part of its state: the
dispatcher has it.

A draining shard still answers for the connections whose milters' objects it has. A shard is gone
when its process has exited, not when its socket is closed: a grandchild may hold that open.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum, auto
from typing import Any, Protocol

from twisted.internet import error
from twisted.logger import Logger

from sharded_milter.alarms import DelayedCall, ReactorTime
from sharded_milter.dispatch.job import Blame, Job, Loss
from sharded_milter.errors import BrokenRule, MilterError, MilterLoadError
from sharded_milter.ipc.channel import MasterChannel
from sharded_milter.ipc.messages import Answer
from sharded_milter.pool.heartbeat import PING_TIMEOUT, Heartbeat, Pulse
from sharded_milter.pool.places import Place
from sharded_milter.pool.table import Cell, row
from sharded_milter.protocol.negotiation import Manifest, SessionAffinity
from sharded_milter.protocol.stages import STAGES
from sharded_milter.protocol.text import quoted, to_text

# Seconds that a worker has to exit after it was told to.
EXIT_GRACE = 5.0

# Seconds after which a worker that has closed its socket, and has not exited, is killed. The socket
# is always closed a moment before the process exits.
LINGER_GRACE = 1.0

# Bytes of the sandbox report: a sentence for the log, with names of milters.
MAX_SANDBOX_TEXT = 1000


class ShardState(Enum):
    """The state of a shard."""

    STARTING = auto()
    SERVING = auto()
    DRAINING = auto()  # it finishes its attempts and the jobs of its objects
    EXITING = auto()  # it was told to exit
    KILLED = auto()
    GONE = auto()


class ShardEvent(Enum):
    """What can happen to a shard."""

    READY = auto()  # the worker has loaded its milters
    LOAD_FAILED = auto()  # it cannot load them
    TOO_SLOW = auto()  # it was not ready within --worker-start-timeout
    ANSWERED = auto()  # it has answered a question
    DRAIN = auto()  # the pool retires it
    OBJECTS_DUE = auto()  # the time is over that its objects have to end
    STOP = auto()  # the service stops
    DRAINED = auto()  # while draining: it has no attempts and no objects
    EXIT_DUE = auto()  # it was told to exit, and has not within EXIT_GRACE
    KILL = auto()
    LINGERING = auto()  # its socket is closed, and it has not exited within LINGER_GRACE
    HEARTBEAT_DUE = auto()  # a second has passed
    PONGED = auto()  # it has answered a ping
    CLOSED = auto()  # its socket is closed
    EXITED = auto()  # the process is reaped


_KILL = Cell(ShardState.KILLED, "_kill_place")
_BROKEN = Cell(ShardState.KILLED, "_break_rule")
_GONE = Cell(ShardState.GONE, "_report_exit")


TRANSITIONS: Mapping[ShardState, Mapping[ShardEvent, Cell[ShardState]]] = {
    ShardState.STARTING: row(
        ShardEvent,
        ShardState.STARTING,
        READY=Cell(ShardState.SERVING, "_become_ready"),
        LOAD_FAILED=Cell(ShardState.EXITING, "_record_failure"),
        TOO_SLOW=_KILL,
        ANSWERED=_BROKEN,
        DRAIN=Cell(ShardState.EXITING, "_shut_down"),
        STOP=_KILL,
        KILL=_KILL,
        CLOSED=Cell(ShardState.STARTING, "_lose_channel"),
        LINGERING=_KILL,
        EXITED=_GONE,
    ),
    ShardState.SERVING: row(
        ShardEvent,
        ShardState.SERVING,
        READY=_BROKEN,
        LOAD_FAILED=_BROKEN,
        ANSWERED=Cell(ShardState.SERVING, "_take_answer"),
        DRAIN=Cell(ShardState.DRAINING, "_retire"),
        STOP=Cell(ShardState.DRAINING, "_stop"),
        KILL=_KILL,
        HEARTBEAT_DUE=Cell(ShardState.SERVING, "_check_heartbeat"),
        PONGED=Cell(ShardState.SERVING, "_record_pong"),
        CLOSED=Cell(ShardState.SERVING, "_lose_channel"),
        LINGERING=_KILL,
        EXITED=_GONE,
    ),
    ShardState.DRAINING: row(
        ShardEvent,
        ShardState.DRAINING,
        READY=_BROKEN,
        LOAD_FAILED=_BROKEN,
        ANSWERED=Cell(ShardState.DRAINING, "_take_answer"),
        OBJECTS_DUE=Cell(ShardState.DRAINING, "_give_up_objects"),
        DRAINED=Cell(ShardState.EXITING, "_shut_down"),
        STOP=_KILL,
        KILL=_KILL,
        HEARTBEAT_DUE=Cell(ShardState.DRAINING, "_check_heartbeat"),
        PONGED=Cell(ShardState.DRAINING, "_record_pong"),
        CLOSED=Cell(ShardState.DRAINING, "_lose_channel"),
        LINGERING=_KILL,
        EXITED=_GONE,
    ),
    ShardState.EXITING: row(
        ShardEvent,
        ShardState.EXITING,
        ANSWERED=Cell(ShardState.EXITING, "_take_answer"),
        EXIT_DUE=_KILL,
        KILL=_KILL,
        EXITED=_GONE,
    ),
    # Answers sent before the kill count, unless it has broken a rule: then nothing more is read.
    ShardState.KILLED: row(
        ShardEvent,
        ShardState.KILLED,
        ANSWERED=Cell(ShardState.KILLED, "_take_answer"),
        EXITED=_GONE,
    ),
    ShardState.GONE: row(ShardEvent, ShardState.GONE),
}


class Ending(Enum):
    """The way in which a shard has ended."""

    NOT_STARTED = auto()  # it was never ready
    ENDED = auto()  # it was told to exit
    DIED = auto()


class ShardDispatcher(Protocol):
    """The dispatcher, as a shard needs it."""

    def retire(self, shard: Shard) -> None: ...
    def drop_objects(self, shard: Shard) -> None: ...
    def unavailable(self, shard: Shard) -> None: ...
    def answered(self, shard: Shard, number: int, answer: Answer) -> str: ...
    def lost(self, shard: Shard, loss: Loss) -> bool: ...


class ShardOwner(Protocol):
    """The pool, as a shard needs it; answers do not pass through it."""

    def shard_ready(self, shard: Shard) -> None: ...
    def recycle_shard(self, shard: Shard, why: str) -> None: ...
    def shard_gone(self, shard: Shard, ending: Ending) -> None: ...


class Shard:
    """One process that answers jobs."""

    log = Logger()

    def __init__(
        self,
        slot: int,
        place: Place,
        dispatcher: ShardDispatcher,
        owner: ShardOwner,
        reactor: ReactorTime,
    ) -> None:
        self.slot = slot
        self.place = place
        self.state = ShardState.STARTING
        self.manifests: tuple[Manifest, ...] = ()  # of its milters; empty before READY
        self.code: bytes = b""  # a digest of the files that they were loaded from
        self.socket = ""  # the address that its script asks to listen on
        self.sandbox = ("", False)  # a sentence for the log; True: the sandbox is incomplete
        self.load_error: MilterError | None = None
        self.loss: Loss | None = None  # why it was killed, then why it is gone
        self.current_queue_id = ""  # of the job that it runs or has run last
        self.answers = 0  # the number of jobs that it has answered
        self.recycle_after = 0  # answers; 0: never
        self.died_at_work = False  # it is gone, and had attempts in flight
        self._dispatcher = dispatcher
        self._owner = owner
        self._reactor = reactor
        self._channel = MasterChannel(self, reactor)
        self._heartbeat = Heartbeat()
        self._shutdown_sent = False
        self._is_closed = False  # its socket is closed, or it has exited
        self._calls: list[DelayedCall] = []  # timeouts

    def __repr__(self) -> str:
        return f"shard {self.slot} (pid {self.place.pid})"

    @property
    def can_serve(self) -> bool:
        """Whether it is ready and takes jobs."""
        return self.state is ShardState.SERVING and not self._is_closed

    def start(self, timeout: float) -> None:
        """Start the process, and kill it if it is not ready within `timeout` seconds.

        Raise OSError if the system refuses, or if the process has ended already.
        """
        self.place.start(self, self._channel)
        if self.state is ShardState.GONE:  # before the place had started it to the end
            self._channel.abort()
            raise OSError(errno.ECHILD, "it has ended at once")
        late = Loss(f"it was not ready within --worker-start-timeout ({timeout:g} s)", Blame.PLACE)
        self._schedule(timeout, ShardEvent.TOO_SLOW, late)

    def _handle_event(self, event: ShardEvent, *details: Any) -> None:
        cell = TRANSITIONS[self.state][event]
        self.state = cell.after
        if cell.act:
            getattr(self, cell.act)(*details)

    # Called by the dispatcher and the pool

    def serves(self, milter: int, manifest: Manifest) -> bool:
        """Return whether its milter with that index has the manifest."""
        return self.manifests[milter : milter + 1] == (manifest,)

    def give(self, number: int, job: Job) -> None:
        """Send a job as the question with that number; raise OSError if it cannot be sent."""
        if self._heartbeat.is_quiet and self._channel.is_idle:
            self._ping()  # if it does not answer this, the job is not to blame
        if job.affinity is None:
            head = (job.letter, job.milter, 0, 0)
            self._channel.ask(number, head, job.connection, job.command or job.message)
        else:
            update = job.affinity.next_update(job.connection, job.message)
            head = (job.letter, job.milter, update.session, update.start)
            try:
                self._channel.ask(number, head, update.connection, update.message, job.command)
            except OSError:
                job.affinity.undo_update()
                raise

    def withdraw(self, number: int) -> None:
        """Ask the worker not to begin the question with that number."""
        self._channel.withdraw(number)

    def catch_up(self) -> None:
        """Read the answers that have arrived."""
        self._channel.catch_up()

    def drained(self) -> None:
        """Tell the worker to exit: it has no attempts and no objects, and gets no more."""
        self._handle_event(ShardEvent.DRAINED)

    def kill(self, loss: Loss) -> None:
        """Kill the process and all its descendants at once."""
        self._handle_event(ShardEvent.KILL, loss)

    def check_heartbeat(self) -> None:
        """Kill the process if it was stopped, or has not answered a ping while idle."""
        self._handle_event(ShardEvent.HEARTBEAT_DUE)

    def dump_stacks(self) -> None:
        """Make the worker log the Python stacks of all its threads."""
        if self.manifests:  # earlier, the signal would end the process
            self.place.dump_stacks()

    def drain(self, objects_timeout: float = 0.0) -> None:
        """Take only jobs of its objects, and exit when they have ended.

        Drop the objects that are left after `objects_timeout` seconds. Attempts in flight are
        finished in any case.
        """
        self._handle_event(ShardEvent.DRAIN, objects_timeout)

    def stop(self) -> None:
        """Tell the worker to exit, or kill it if it has attempts in flight: the service stops."""
        self._handle_event(ShardEvent.STOP, Loss("the service stops", Blame.PLACE))

    # Called by the channel and the place

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None:
        """Take the manifests of the loaded milters; raise BrokenRule for invalid ones."""
        try:
            manifests = tuple(map(_manifest, milters))
        except Exception as error:  # a hostile field may raise anything
            raise BrokenRule(f"its milters' manifests are invalid: {error!r:.200}") from error
        self._handle_event(ShardEvent.READY, manifests, code, socket)

    def load_failed(self, reason: bytes, details: bytes) -> None:
        """Take the reason for which the worker cannot load a milter."""
        self._handle_event(ShardEvent.LOAD_FAILED, reason, details)

    def sandboxed(self, text: bytes, incomplete: bytes) -> None:
        """Take the worker's report about its sandbox, for the log."""
        self.sandbox = (to_text(text[:MAX_SANDBOX_TEXT]), bool(incomplete))

    def answered(self, number: int, answer: Answer) -> None:
        """Take the answer to the question with that number."""
        self._handle_event(ShardEvent.ANSWERED, number, answer)

    def ponged(self) -> None:
        """Take the answer to a ping."""
        self._handle_event(ShardEvent.PONGED)

    def broke_rule(self, why: str) -> None:
        """Kill the worker, which has broken a rule of the channel, and read nothing more from it.

        As after a death, the message that it scans is to blame: it may have taken the worker over.
        """
        self._channel.stop_reading()
        self.kill(Loss(why, Blame.MESSAGE))

    def channel_closed(self) -> None:
        """Stop giving jobs to a worker whose socket is closed."""
        self._handle_event(ShardEvent.CLOSED)

    def output(self, line: bytes) -> None:
        """Log a line of the worker's output."""
        about = str(self.slot)
        if self.current_queue_id:
            about += f" qid={quoted(self.current_queue_id)}"
        self.log.info("[{about}] {line}", about=about, line=to_text(line))

    def output_dropped(self, lines: int, size: int) -> None:
        """Log how much output was dropped in one second."""
        self.log.warn(
            "shard {n} wrote more than the log takes in a second: {lines} lines, {size} bytes in"
            " all, are dropped",
            n=self.slot,
            lines=lines,
            size=size,
        )

    def exited(self, reason: str) -> None:
        """Take the exit of the process; answers that it sent before count."""
        self._is_closed = True
        self._dispatcher.unavailable(self)
        try:
            self._channel.finish()
        finally:  # an error here must not lose the shard's jobs and its slot
            self._handle_event(ShardEvent.EXITED, reason)

    def _become_ready(self, manifests: tuple[Manifest, ...], code: bytes, socket: bytes) -> None:
        self.socket, self.code = to_text(socket), code
        self.manifests = manifests
        self._cancel_calls()
        self._owner.shard_ready(self)

    def _record_failure(self, reason: bytes, details: bytes) -> None:
        self.load_error = MilterLoadError(to_text(reason), to_text(details))
        self._shut_down()

    def _take_answer(self, number: int, answer: Answer) -> None:
        self._heartbeat.reset()
        self.place.read_output()
        broken = self._dispatcher.answered(self, number, answer)
        if broken:
            self.broke_rule(broken)
        elif not answer.withdrawn:
            self.answers += 1
            if answer.short:
                self._owner.recycle_shard(self, to_text(answer.short))
            elif self.answers == self.recycle_after:
                self._owner.recycle_shard(self, f"it has given {self.answers} answers")

    def _break_rule(self, *_: Any) -> None:
        self._channel.stop_reading()
        self._kill_place(Loss("it has sent a message that its state does not allow", Blame.MESSAGE))

    def _retire(self, objects_timeout: float) -> None:
        self._schedule(objects_timeout, ShardEvent.OBJECTS_DUE)
        self._dispatcher.retire(self)

    def _stop(self, loss: Loss) -> None:
        """Drain without waiting for objects; kill the worker if attempts are in flight."""
        self._dispatcher.drop_objects(self)
        self._dispatcher.retire(self)
        self._handle_event(ShardEvent.STOP, loss)

    def _give_up_objects(self) -> None:
        self._dispatcher.drop_objects(self)

    def _shut_down(self, *_: Any) -> None:
        self._shutdown_sent = True
        self._schedule(
            EXIT_GRACE, ShardEvent.EXIT_DUE, Loss("it did not exit when it was told", Blame.PLACE)
        )
        self._channel.shut_down()

    def _lose_channel(self) -> None:
        self._is_closed = True
        self._schedule(
            LINGER_GRACE, ShardEvent.LINGERING, Loss("its socket was closed", Blame.MESSAGE)
        )
        self._dispatcher.unavailable(self)

    def _kill_place(self, loss: Loss) -> None:
        self.loss = self.loss or loss
        self._dispatcher.unavailable(self)
        self.place.kill()

    def _report_exit(self, reason: str) -> None:
        self.loss = self.loss or Loss(reason, Blame.MESSAGE)
        self._cancel_calls()
        self._channel.abort()
        self.place.kill_descendants()
        self.died_at_work = self._dispatcher.lost(self, self.loss)
        ending = Ending.ENDED if self._shutdown_sent else Ending.DIED
        self._owner.shard_gone(self, ending if self.manifests else Ending.NOT_STARTED)

    def _check_heartbeat(self) -> None:
        self._channel.catch_up()  # an answer that has arrived counts
        pulse = self._heartbeat.check(idle=self._channel.is_idle, stopped=self.place.is_stopped())
        if pulse is Pulse.PING_DUE:
            self._ping()
        elif pulse is Pulse.STOPPED:
            # With an open ping it was stopped before its job; else its job is to blame.
            blame = Blame.PLACE if self._heartbeat.awaits_pong else Blame.MESSAGE
            self.kill(Loss("it was stopped by a signal", blame))
        elif pulse is Pulse.UNRESPONSIVE and not self.place.is_traced():
            why = f"it was idle and has not answered a ping within {PING_TIMEOUT} s"
            self.kill(Loss(why, Blame.PLACE))

    def _ping(self) -> None:
        self._heartbeat.ping_sent()
        self._channel.ping()

    def _record_pong(self) -> None:
        self._heartbeat.pong_received()

    def _cancel_calls(self) -> None:
        for call in self._calls:
            with suppress(error.AlreadyCalled, error.AlreadyCancelled):
                call.cancel()
        self._calls.clear()

    def _schedule(self, seconds: float, event: ShardEvent, *details: Any) -> None:
        self._calls.append(self._reactor.callLater(seconds, self._handle_event, event, *details))


def _manifest(milter: Mapping[str, bytes]) -> Manifest:
    return Manifest.from_packet(
        to_text(milter["name"]),
        milter["negotiation"],
        frozenset(STAGES[letter] for letter in milter["light"]),
        to_text(milter["shard_by"]),
        SessionAffinity(to_text(milter["affinity"])),
    )
