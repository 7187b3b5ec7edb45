"""A shard: one process that answers jobs, from its start to its exit.

    starting ──▶ serving ──▶ draining ──▶ leaving ──▶ gone
        └────────────┴───────────┴───── killed ────────▶┘

The law: what an event means in a state is one constant table, TRANSITIONS, which has a cell for
each event in each state, the late ones included. The state is assigned in `_happens` and nowhere
else; so the table and what acts on it stay in this one file, though it is long. How busy a shard
is, is no state of it: dispatch knows what it has in hand.

A draining shard still answers for the connections whose milters' objects it has. A death is what
the process's exit says, not a closed socket, which a grandchild may hold open.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from enum import Enum, auto
from typing import Any, Protocol

from twisted.internet import error
from twisted.logger import Logger

from sharded_milter.dispatch.job import Blame, Job, Loss
from sharded_milter.errors import BrokenRule, MilterError, MilterLoadError
from sharded_milter.ipc.channel import MasterChannel
from sharded_milter.ipc.messages import Answer
from sharded_milter.pool.heartbeat import DEAF, Heartbeat, Pulse
from sharded_milter.pool.places import Place
from sharded_milter.pool.table import Cell, row
from sharded_milter.protocol.negotiation import Manifest, SessionAffinity
from sharded_milter.protocol.stages import STAGES
from sharded_milter.protocol.text import quoted, to_text

# A worker that was told to end gets this long.
EXIT_GRACE = 5.0

# A socket is closed a moment before the exit that explains it; a worker that has closed it and
# lives on is killed after this long.
SILENCE_GRACE = 1.0

# A sentence for the log, and names of milters in it.
MAX_SANDBOX_TEXT = 1000


class State(Enum):
    """Where a shard is in its life."""

    STARTING = auto()
    SERVING = auto()
    DRAINING = auto()  # it finishes what it has in hand, and what its objects are told
    LEAVING = auto()  # it was told to exit
    KILLED = auto()
    GONE = auto()


class Event(Enum):
    """What can happen to a shard."""

    READY = auto()  # the worker has loaded its milters
    LOAD_FAILED = auto()  # it cannot
    TOO_SLOW = auto()  # it has had its time for that
    ANSWERED = auto()  # an answer has come
    DRAIN = auto()  # the pool wants no more of it
    LINGERED = auto()  # its objects have had their time
    STOP = auto()  # the service stops
    DRAINED = auto()  # draining, it has nothing in hand and no objects
    EXIT_DUE = auto()  # it was told to exit, and has had its time for that
    KILL = auto()
    SILENT = auto()  # its socket is closed, and it lives on
    LOOK = auto()  # a second is over
    PONGED = auto()  # it has answered a ping
    CLOSED = auto()  # its socket is closed
    EXITED = auto()  # the process is reaped


_KILL = Cell(State.KILLED, "_kill_place")
_BROKEN = Cell(State.KILLED, "_break_rule")
_GONE = Cell(State.GONE, "_report")


TRANSITIONS: Mapping[State, Mapping[Event, Cell[State]]] = {
    State.STARTING: row(
        Event,
        State.STARTING,
        READY=Cell(State.SERVING, "_introduce"),
        LOAD_FAILED=Cell(State.LEAVING, "_note_failure"),
        TOO_SLOW=_KILL,
        ANSWERED=_BROKEN,
        DRAIN=Cell(State.LEAVING, "_leave"),
        STOP=_KILL,
        KILL=_KILL,
        CLOSED=Cell(State.STARTING, "_lose_channel"),
        SILENT=_KILL,
        EXITED=_GONE,
    ),
    State.SERVING: row(
        Event,
        State.SERVING,
        READY=_BROKEN,
        LOAD_FAILED=_BROKEN,
        ANSWERED=Cell(State.SERVING, "_take"),
        DRAIN=Cell(State.DRAINING, "_retire"),
        STOP=Cell(State.DRAINING, "_stop"),
        KILL=_KILL,
        LOOK=Cell(State.SERVING, "_look"),
        PONGED=Cell(State.SERVING, "_note_pong"),
        CLOSED=Cell(State.SERVING, "_lose_channel"),
        SILENT=_KILL,
        EXITED=_GONE,
    ),
    State.DRAINING: row(
        Event,
        State.DRAINING,
        READY=_BROKEN,
        LOAD_FAILED=_BROKEN,
        ANSWERED=Cell(State.DRAINING, "_take"),
        LINGERED=Cell(State.DRAINING, "_give_up_objects"),
        DRAINED=Cell(State.LEAVING, "_leave"),
        STOP=_KILL,
        KILL=_KILL,
        LOOK=Cell(State.DRAINING, "_look"),
        PONGED=Cell(State.DRAINING, "_note_pong"),
        CLOSED=Cell(State.DRAINING, "_lose_channel"),
        SILENT=_KILL,
        EXITED=_GONE,
    ),
    State.LEAVING: row(
        Event,
        State.LEAVING,
        ANSWERED=Cell(State.LEAVING, "_take"),
        EXIT_DUE=_KILL,
        KILL=_KILL,
        EXITED=_GONE,
    ),
    # What it had answered before is taken, unless it has broken a rule: then it is not read.
    State.KILLED: row(Event, State.KILLED, ANSWERED=Cell(State.KILLED, "_take"), EXITED=_GONE),
    State.GONE: row(Event, State.GONE),
}


class Ending(Enum):
    """How a shard has ended, as the pool sees it."""

    NOT_STARTED = auto()  # it was never ready
    ENDED = auto()  # it was told to leave
    DIED = auto()


class Work(Protocol):
    """Who gives it jobs: the dispatcher."""

    def retire(self, shard: Shard) -> None: ...
    def drop_objects(self, shard: Shard) -> None: ...
    def unavailable(self, shard: Shard) -> None: ...
    def answered(self, shard: Shard, number: int, answer: Answer) -> str: ...
    def lost(self, shard: Shard, loss: Loss) -> bool: ...


class Events(Protocol):
    """Who replaces it: the pool. It observes, and stands in the way of no answer."""

    def shard_ready(self, shard: Shard) -> None: ...
    def shard_worn(self, shard: Shard, why: str) -> None: ...
    def shard_gone(self, shard: Shard, ending: Ending) -> None: ...


class Shard:
    """One process that answers jobs."""

    log = Logger()

    def __init__(self, slot: int, place: Place, work: Work, events: Events, reactor: Any) -> None:
        self.slot = slot
        self.place = place
        self.state = State.STARTING
        self.manifests: tuple[Manifest, ...] = ()  # of its milters; none before READY
        self.code: bytes = b""  # a digest of the files that they were loaded from
        self.socket = ""  # where its script wants to listen
        self.sandbox = ("", False)  # what became of it, and whether that is incomplete
        self.load_error: MilterError | None = None
        self.loss: Loss | None = None  # why it was killed, then why it is gone
        self.current_queue_id = ""  # the queue id of what it does, or did last
        self.answers = 0  # that it has given
        self.worn_after = 0  # answers; 0: never
        self.died_at_work = False  # it is gone, and had a job in hand
        self._work = work
        self._events = events
        self._reactor = reactor
        self._channel = MasterChannel(self, reactor)
        self._heartbeat = Heartbeat()
        self._told_to_leave = False
        self._has_ended = False  # or its socket has
        self._calls: list[Any] = []  # what is due

    def __repr__(self) -> str:
        return f"shard {self.slot} (pid {self.place.pid})"

    @property
    def can_serve(self) -> bool:
        """Whether it is ready, and may be given something."""
        return self.state is State.SERVING and not self._has_ended

    def start(self, timeout: float) -> None:
        """Starts the process, which must be ready within `timeout` seconds.

        Raises OSError when the system refuses.
        """
        self.place.start(self, self._channel)
        late = Loss(f"it was not ready within --worker-start-timeout ({timeout:g} s)", Blame.PLACE)
        self._due(timeout, Event.TOO_SLOW, late)

    def _happens(self, event: Event, *details: Any) -> None:
        cell = TRANSITIONS[self.state][event]
        self.state = cell.after
        if cell.act:
            getattr(self, cell.act)(*details)

    # What the dispatcher and the pool call

    def serves(self, milter: int, manifest: Manifest) -> bool:
        """Whether its milter of that number is the one with the manifest."""
        return self.manifests[milter : milter + 1] == (manifest,)

    def give(self, number: int, job: Job) -> None:
        """Sends a job as the question of that number; raises OSError where memory is short."""
        if self._heartbeat.is_quiet and self._channel.is_idle:
            self._ping()  # if this is not answered, the job is not to blame
        if job.affinity is None:
            head = (job.letter, job.milter, 0, 0)
            self._channel.ask(number, head, job.connection, job.command or job.message)
        else:
            news = job.affinity.next_update(job.connection, job.message)
            head = (job.letter, job.milter, news.session, news.start)
            self._channel.ask(number, head, news.connection, news.message, job.command)

    def withdraw(self, number: int) -> None:
        """Asks the worker not to begin that question."""
        self._channel.withdraw(number)

    def catch_up(self) -> None:
        """Takes the answers that have arrived."""
        self._channel.catch_up()

    def drained(self) -> None:
        """It has nothing in hand and no objects, and is to get neither."""
        self._happens(Event.DRAINED)

    def kill(self, loss: Loss) -> None:
        """Ends the process and all its descendants at once."""
        self._happens(Event.KILL, loss)

    def look(self) -> None:
        """A second is over: one that was stopped, or is deaf while it is idle, is killed."""
        self._happens(Event.LOOK)

    def dump_stacks(self) -> None:
        """Has the worker write the Python stacks of all its threads into the log."""
        if self.manifests:  # earlier, it would end the process
            self.place.stacks()

    def drain(self, linger: float = 0.0) -> None:
        """Takes no more jobs but its objects'; exits when they end, or `linger` seconds are over.

        What it has in hand it finishes in any case.
        """
        self._happens(Event.DRAIN, linger)

    def stop(self) -> None:
        """The service stops: it exits at once, or is killed if it has something in hand."""
        self._happens(Event.STOP, Loss("the service stops", Blame.PLACE))

    # What the worker says

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None:
        """It has loaded its milters; raises BrokenRule where they cannot be any."""
        try:
            manifests = tuple(map(_manifest, milters))
        except Exception as error:  # whatever a field leads to
            raise BrokenRule(f"its milters cannot be: {error!r:.200}") from error
        self._happens(Event.READY, manifests, code, socket)

    def load_failed(self, reason: bytes, details: bytes) -> None:
        """It cannot load a milter."""
        self._happens(Event.LOAD_FAILED, reason, details)

    def sandboxed(self, text: bytes, incomplete: bytes) -> None:
        """It has entered its sandbox, or not; no state depends on that."""
        self.sandbox = (to_text(text[:MAX_SANDBOX_TEXT]), bool(incomplete))

    def answered(self, number: int, answer: Answer) -> None:
        """It has answered the question of that number."""
        self._happens(Event.ANSWERED, number, answer)

    def ponged(self) -> None:
        """It has answered a ping."""
        self._happens(Event.PONGED)

    def broke_rule(self, why: str) -> None:
        """It has said what no worker says: nothing more is taken from it.

        As with a death, the message that it is at work on is to blame: it may have taken it over.
        """
        self._channel.stop_listening()
        self.kill(Loss(why, Blame.MESSAGE))

    def channel_closed(self) -> None:
        """Its socket is closed."""
        self._happens(Event.CLOSED)

    def output(self, line: bytes) -> None:
        """A line that the worker wrote."""
        about = str(self.slot)
        if self.current_queue_id:
            about += f" qid={quoted(self.current_queue_id)}"
        self.log.info("[{about}] {line}", about=about, line=to_text(line))

    def output_dropped(self, lines: int, size: int) -> None:
        """The worker has written more within a second than is shown."""
        self.log.warn(
            "shard {n} wrote more than the log takes in a second: {lines} lines, {size} bytes in"
            " all, are dropped",
            n=self.slot,
            lines=lines,
            size=size,
        )

    def exited(self, reason: str) -> None:
        """The process is reaped. What it had answered before counts."""
        self._has_ended = True
        self._work.unavailable(self)
        self._channel.catch_up()
        self._happens(Event.EXITED, reason)

    def _introduce(self, manifests: tuple[Manifest, ...], code: bytes, socket: bytes) -> None:
        self.socket, self.code = to_text(socket), code
        self.manifests = manifests
        self._cancel_calls()
        self._events.shard_ready(self)

    def _note_failure(self, reason: bytes, details: bytes) -> None:
        self.load_error = MilterLoadError(to_text(reason), to_text(details))
        self._leave()

    def _take(self, number: int, answer: Answer) -> None:
        self._heartbeat.heard()
        self.place.read_output()
        broken = self._work.answered(self, number, answer)
        if broken:
            self.broke_rule(broken)
        elif not answer.withdrawn:
            self.answers += 1
            if answer.short:
                self._events.shard_worn(self, to_text(answer.short))
            elif self.answers == self.worn_after:
                self._events.shard_worn(self, f"it has given {self.answers} answers")

    def _break_rule(self, *_: Any) -> None:
        self._channel.stop_listening()
        self._kill_place(Loss("it has spoken out of turn", Blame.MESSAGE))

    def _retire(self, linger: float) -> None:
        self._due(linger, Event.LINGERED)
        self._work.retire(self)

    def _stop(self, loss: Loss) -> None:
        """It is draining from now on; one that is not drained by that is busy."""
        self._work.drop_objects(self)
        self._work.retire(self)
        self._happens(Event.STOP, loss)

    def _give_up_objects(self) -> None:
        self._work.drop_objects(self)

    def _leave(self, *_: Any) -> None:
        self._told_to_leave = True
        self._due(EXIT_GRACE, Event.EXIT_DUE, Loss("it did not exit when it was told", Blame.PLACE))
        self._channel.shut_down()

    def _lose_channel(self) -> None:
        self._has_ended = True
        self._due(SILENCE_GRACE, Event.SILENT, Loss("its socket was closed", Blame.MESSAGE))
        self._work.unavailable(self)

    def _kill_place(self, loss: Loss) -> None:
        self.loss = self.loss or loss
        self._work.unavailable(self)
        self.place.kill()

    def _report(self, reason: str) -> None:
        self.loss = self.loss or Loss(reason, Blame.MESSAGE)
        self._cancel_calls()
        self._channel.abort()
        self.place.end_family()
        self.died_at_work = self._work.lost(self, self.loss)
        ending = Ending.ENDED if self._told_to_leave else Ending.DIED
        self._events.shard_gone(self, ending if self.manifests else Ending.NOT_STARTED)

    def _look(self) -> None:
        self._channel.catch_up()  # what it has said until now counts
        pulse = self._heartbeat.look(idle=self._channel.is_idle, stopped=self.place.is_stopped())
        if pulse is Pulse.SILENT:
            self._ping()
        elif pulse is Pulse.STOPPED:
            # Stopped before it was given anything, as far as is known, or at work on that.
            blame = Blame.PLACE if self._heartbeat.is_asked else Blame.MESSAGE
            self.kill(Loss("it was stopped by a signal", blame))
        elif pulse is Pulse.DEAF and not self.place.is_traced():
            why = f"it was idle and has not answered a ping within {DEAF} s"
            self.kill(Loss(why, Blame.PLACE))

    def _ping(self) -> None:
        self._heartbeat.asked()
        self._channel.ping()

    def _note_pong(self) -> None:
        self._heartbeat.answered()

    def _cancel_calls(self) -> None:
        for call in self._calls:
            with suppress(error.AlreadyCalled, error.AlreadyCancelled):
                call.cancel()
        self._calls.clear()

    def _due(self, seconds: float, event: Event, *details: Any) -> None:
        self._calls.append(self._reactor.callLater(seconds, self._happens, event, *details))


def _manifest(milter: Mapping[str, bytes]) -> Manifest:
    return Manifest.from_packet(
        to_text(milter["name"]),
        milter["negotiation"],
        frozenset(STAGES[letter] for letter in milter["light"]),
        to_text(milter["shard_by"]),
        SessionAffinity(to_text(milter["affinity"])),
    )
