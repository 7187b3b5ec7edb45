"""The session: where a conversation stands, and what a command or a verdict does to it.

The law: which command is legal when, and what follows from it, is one constant table,
TRANSITIONS. A missing cell is a protocol error of the MTA. What follows from our verdicts is a
second one, AFTER_VERDICT; what becomes of macros a third, MACROS. Under an agreement they are
compiled into what each packet does. No other code assigns or asks for the state; so the tables and
what reads them stay in this one file, though it is long.

The state is the MTA's position in a message. MTAs leave out the stages that were suppressed, so
a jump forward is legal when what it passes over was suppressed (`Cell.passes`); DATA, HEADER,
EOH and BODY may be missing from any message. The tables follow what Postfix and Sendmail were
seen to do, which is more than libmilter allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from sharded_milter.errors import LocalProtocolError, RemoteProtocolError
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.commands import (
    LONGEST,
    SHAPES,
    Body,
    Header,
    Macro,
    Negotiate,
    check_command,
)
from sharded_milter.protocol.negotiation import Agreement, Handling
from sharded_milter.protocol.replies import Accept, Discard, Reject, ReplyCode, TempFail
from sharded_milter.protocol.stages import NO_PROTOCOL, STAGES, Protocol, Stage
from sharded_milter.protocol.wire import HEAD, LENGTH_BYTES, LETTER, MAX_PACKET, PAYLOAD

_MACRO = Macro.letter[0]
_NEGOTIATE = Negotiate.letter[0]


class State(Enum):
    """Where the MTA is."""

    __hash__ = object.__hash__  # members are single; Enum's own hash is a call of Python's

    START = auto()  # nothing was said
    NEGOTIATED = auto()  # options are agreed, no client yet
    CONNECTED = auto()  # a client is there, no message
    MAIL = auto()  # a sender was named
    RCPT = auto()  # a recipient was named
    DATA = auto()  # the client said DATA
    HEADER = auto()  # header fields come
    BODY = auto()  # the body comes
    DECIDED = auto()  # the message has its verdict before its end
    CLOSED = auto()  # the MTA has left


class Keep(Enum):
    """Where in the transcript a packet is kept."""

    NO = auto()
    SLOT = auto()  # in the place of its kind in the connection's part, over the one before
    APPEND = auto()  # at the end of the message's part
    BEGIN = auto()  # as the first of a new message's part


class Leaves(Enum):
    """What the MTA leaves behind with a command."""

    NOTHING = auto()
    MESSAGE = auto()  # the message in hand is dropped
    CLIENT = auto()  # the client is gone, another may follow on this connection
    US = auto()  # the connection is over


@dataclass(frozen=True, slots=True)
class Cell:
    """What a command does."""

    after: State
    keep: Keep = Keep.NO
    leaves: Leaves = Leaves.NOTHING
    passes: Protocol = NO_PROTOCOL  # stages passed over, which must have been suppressed
    asked: bool = True  # whether a milter may be asked; if not, the answer is CONTINUE


def _codes(row: Mapping[bytes, Cell]) -> Mapping[int, Cell]:
    return {letter[0]: cell for letter, cell in row.items()}


def _content(passes: Protocol = NO_PROTOCOL) -> dict[bytes, Cell]:
    """The content of a message begins or goes on."""
    return {
        b"L": Cell(State.HEADER, Keep.APPEND, passes=passes),
        b"N": Cell(State.BODY, Keep.APPEND, passes=passes),
        b"B": Cell(State.BODY, Keep.APPEND, passes=passes),
        b"E": Cell(State.CONNECTED, Keep.APPEND, passes=passes),
    }


def _no_message(stay: State, passes: Protocol = NO_PROTOCOL) -> dict[bytes, Cell]:
    """No message is open: one may begin, with whatever its first stage is that is sent."""
    to_rcpt = passes | Protocol.NO_MAIL
    return {
        b"H": Cell(State.CONNECTED, Keep.SLOT, passes=passes),
        b"M": Cell(State.MAIL, Keep.APPEND, passes=passes),
        b"R": Cell(State.RCPT, Keep.APPEND, passes=to_rcpt),
        b"T": Cell(State.DATA, Keep.APPEND, passes=to_rcpt | Protocol.NO_RCPT),
        **_content(to_rcpt | Protocol.NO_RCPT),
        b"U": Cell(stay),
        # Postfix sends ABORT after every message, also after those that it delivered.
        b"A": Cell(stay, leaves=Leaves.MESSAGE),
        b"Q": Cell(State.CLOSED, leaves=Leaves.US),
        b"K": Cell(State.NEGOTIATED, leaves=Leaves.CLIENT),
    }


def _message(stay: State) -> dict[bytes, Cell]:
    """A message is open.

    HELO ends it (Postfix sends its ABORT only afterwards), and so does MAIL (Sendmail sends no
    ABORT when MAIL went unanswered).
    """
    return {
        b"H": Cell(State.CONNECTED, Keep.SLOT, Leaves.MESSAGE),
        b"M": Cell(State.MAIL, Keep.BEGIN, Leaves.MESSAGE),
        b"U": Cell(stay),
        b"A": Cell(State.CONNECTED, leaves=Leaves.MESSAGE),
        b"Q": Cell(State.CLOSED, leaves=Leaves.US),
        b"K": Cell(State.NEGOTIATED, leaves=Leaves.CLIENT),
    }


_RCPT = {b"R": Cell(State.RCPT, Keep.APPEND)}
_DATA = {b"T": Cell(State.DATA, Keep.APPEND)}

TRANSITIONS: Mapping[State, Mapping[int, Cell]] = {
    State.START: _codes({b"O": Cell(State.NEGOTIATED), b"Q": Cell(State.CLOSED, leaves=Leaves.US)}),
    State.NEGOTIATED: _codes(
        {
            **_no_message(State.NEGOTIATED, Protocol.NO_CONNECT),
            b"C": Cell(State.CONNECTED, Keep.SLOT),
        }
    ),
    State.CONNECTED: _codes(_no_message(State.CONNECTED)),
    State.MAIL: _codes(
        {
            **_message(State.MAIL),
            **_RCPT,
            b"T": Cell(State.DATA, Keep.APPEND, passes=Protocol.NO_RCPT),
            **_content(Protocol.NO_RCPT),
        }
    ),
    State.RCPT: _codes({**_message(State.RCPT), **_RCPT, **_DATA, **_content()}),
    # A refused DATA leaves the envelope open: recipients and DATA may come again.
    State.DATA: _codes({**_message(State.DATA), **_RCPT, **_DATA, **_content()}),
    State.HEADER: _codes({**_message(State.HEADER), **_content()}),
    State.BODY: _codes(
        {
            **_message(State.BODY),
            b"B": Cell(State.BODY, Keep.APPEND),
            b"E": Cell(State.CONNECTED, Keep.APPEND),
        }
    ),
    # No MTA goes on with a decided message; one that does is humoured.
    State.DECIDED: _codes(
        {
            **_message(State.DECIDED),
            **dict.fromkeys((b"R", b"T", b"L", b"N", b"B"), Cell(State.DECIDED, asked=False)),
            b"E": Cell(State.CONNECTED, leaves=Leaves.MESSAGE, asked=False),
        }
    ),
    State.CLOSED: {},
}


def _macros(stay: State, begin: Cell, keep: Keep = Keep.APPEND) -> Mapping[int, Cell]:
    slot = Cell(stay, Keep.SLOT)
    return _codes(
        {
            b"C": slot,
            b"H": slot,
            b"M": begin,
            **dict.fromkeys((b"R", b"T", b"N", b"E"), Cell(stay, keep)),
        }
    )


_BEGIN = Cell(State.CONNECTED, Keep.BEGIN, Leaves.MESSAGE)

# Macros come before their command, or without it where the command is suppressed or the MTA
# itself refused it. Those of MAIL begin a message. A missing row is a protocol error of the MTA.
# Letters that are missing in a row (Postfix sends L, B and U) tell nothing that the others do
# not, and are dropped, as libmilter does.
MACROS: Mapping[State, Mapping[int, Cell]] = {
    **{
        state: _macros(state, Cell(state, Keep.BEGIN))
        for state in (State.NEGOTIATED, State.CONNECTED)
    },
    **{
        state: _macros(state, _BEGIN)
        for state in (State.MAIL, State.RCPT, State.DATA, State.HEADER, State.BODY)
    },
    State.DECIDED: _macros(State.DECIDED, _BEGIN, Keep.NO),
}

_REFUSALS = frozenset(kind.letter[0] for kind in (Reject, TempFail, ReplyCode))
_ENDINGS = frozenset(kind.letter[0] for kind in (Accept, Discard))

# The state after a verdict other than CONTINUE and SKIP; a missing cell leaves it as it is.
AFTER_VERDICT: Mapping[Stage, Mapping[int, State]] = {
    Stage.MAIL: {
        **dict.fromkeys(_REFUSALS, State.CONNECTED),
        **dict.fromkeys(_ENDINGS, State.DECIDED),
    },
    # A refusal is of this recipient, or of this DATA command, and the message lives on.
    Stage.RCPT: dict.fromkeys(_ENDINGS, State.DECIDED),
    Stage.DATA: dict.fromkeys(_ENDINGS, State.DECIDED),
    **dict.fromkeys(
        (Stage.HEADER, Stage.EOH, Stage.BODY),
        dict.fromkeys(_REFUSALS | _ENDINGS, State.DECIDED),
    ),
}


# Stands behind a refused RCPT or DATA in the transcript, whatever words the refusal had.
REFUSED = Reject().encode()


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done about a packet, in this order: `leaves`, `keep`, `handling`."""

    stage: Stage | None = None  # set where the MTA may wait for an answer
    handling: Handling = Handling.SILENT
    keep: Keep = Keep.NO
    leaves: Leaves = Leaves.NOTHING
    offer: Negotiate | None = None  # the MTA offers options and waits for ours


# Packets that are followed in one go. That takes a millisecond, in which others wait; a message of
# 100 header fields and as many pieces of 64 KB comes in one.
MAX_RUN = 2000

# What is content is kept unread; of the rest the transcript notes some.
_CONTENT = frozenset((Header.letter[0], Body.letter[0]))


# The key of a macro packet, which is told apart by the stage that it is for.
def _macro_key(letter: int) -> int:
    return _MACRO << 8 | letter


class Run(NamedTuple):
    """A packet that is only kept: the state after, its shape, and how long it may be.

    With no shape the payload is anything: `start` is its own, `counts` is None. What is content
    is not noted, and has no `longest`.
    """

    after: State
    start: int
    counts: range | None
    longest: int | None


class Compiled(NamedTuple):
    """What each packet does under one agreement, by the state in which it comes and its key.

    The key is its letter, or that of a macro packet. `steps` has the state after and what is to
    be done. `runs` has those that are only kept. A key that is missing cannot come there.
    """

    steps: Mapping[State, Mapping[int, tuple[State, Step]]]
    runs: Mapping[State, Mapping[int, Run]]


def compiled(agreement: Agreement) -> Compiled:
    """The tables above as they hold under an agreement; worked out once for each."""
    known: Compiled | None = agreement.known.get(Compiled)
    if known is None:
        steps = {state: _steps_in(state, agreement) for state in State}
        runs = {
            state: {
                key: _run(key, after)
                for key, (after, step) in row.items()
                if step == Step(step.stage, keep=Keep.APPEND)
            }
            for state, row in steps.items()
        }
        known = agreement.known[Compiled] = Compiled(steps, runs)
    return known


def _run(key: int, after: State) -> Run:
    letter = key >> 8 or key
    start, counts = SHAPES.get(letter, (PAYLOAD, None))
    longest = None if letter in _CONTENT else LONGEST.get(letter, MAX_PACKET)
    return Run(after, start, counts, longest)


def _steps_in(state: State, agreement: Agreement) -> dict[int, tuple[State, Step]]:
    steps = {
        code: (cell.after, _step(code, cell, agreement))
        for code, cell in TRANSITIONS[state].items()
        if not cell.passes & ~agreement.protocol
    }
    macros = MACROS.get(state)
    if macros is not None:
        for letter in range(256):
            cell = macros.get(letter, Cell(state))
            steps[_macro_key(letter)] = cell.after, Step(keep=cell.keep, leaves=cell.leaves)
    return steps


def _step(code: int, cell: Cell, agreement: Agreement) -> Step:
    stage = STAGES.get(code)
    if stage is None:
        return Step(leaves=cell.leaves)
    handling = agreement.handling[code]
    if handling is Handling.ASK and not cell.asked:
        handling = Handling.CONTINUE
    keep = cell.keep if code in agreement.recorded else Keep.NO
    return Step(stage, handling, keep, cell.leaves)


# Before anything is agreed.
_AT_START = Compiled(
    {
        State.START: {
            code: (cell.after, Step(leaves=cell.leaves))
            for code, cell in TRANSITIONS[State.START].items()
        }
    },
    {},
)


class Decision(NamedTuple):
    """What a verdict means for the transcript."""

    final: int  # the letter of the final reply
    mark: bytes  # what is kept behind a refused command, for whoever reads the transcript on
    ended: bool  # the message is over; its part of the transcript is of no more use


class Session:
    """One MTA connection's place in the protocol; no I/O."""

    __slots__ = ("_agreement", "_runs", "_state", "_steps")

    def __init__(self, state: State = State.START) -> None:
        self._state = state
        self._agreement: Agreement | None = None
        self._steps, self._runs = _AT_START

    @property
    def state(self) -> State:
        """Where the MTA is."""
        return self._state

    @property
    def is_closed(self) -> bool:
        """Whether the MTA has left, or we have; no command may come any more."""
        return self._state is State.CLOSED

    @property
    def agreement(self) -> Agreement:
        """What was negotiated; LocalProtocolError before that."""
        if self._agreement is None:
            raise LocalProtocolError("nothing is negotiated yet")
        return self._agreement

    def agree(self, agreement: Agreement) -> None:
        """Option negotiation ended with this."""
        self._agreement = agreement
        self._steps, self._runs = compiled(agreement)

    def close(self) -> None:
        """We end the connection."""
        self._state = State.CLOSED

    def receive(self, packet: bytes) -> Step:
        """What a whole packet of the MTA asks for; moves on to the state after it.

        Raises RemoteProtocolError, and changes nothing, when the packet is malformed or cannot
        come here. What was received is well-formed, and so are transcripts.
        """
        code = packet[LETTER]
        if code == _MACRO:
            code = _MACRO << 8 | (packet[PAYLOAD] if len(packet) > PAYLOAD else 0)
        row = self._steps.get(self._state)
        known = row.get(code) if row is not None else None
        if known is None:
            raise self._illegal(code)
        check_command(packet)
        offer = Negotiate.offer(packet[PAYLOAD:]) if code == _NEGOTIATE else None
        self._state, step = known
        return step if offer is None else Step(offer=offer)

    def _illegal(self, code: int) -> RemoteProtocolError:
        """Why a packet cannot come here."""
        state = self._state.name
        if code > 255:
            return RemoteProtocolError(f"macros in state {state}")
        cell = TRANSITIONS[self._state].get(code)
        if cell is None:
            return RemoteProtocolError(f"{_name(code)} in state {state}")
        missing = cell.passes & ~self.agreement.protocol
        return RemoteProtocolError(f"{_name(code)} in state {state} without {missing.name}")

    def receive_run(self, buffer: bytearray, at: int) -> tuple[int, list[bytes]]:
        """Follows the packets from `at` on that are only kept, as most of a message's are.

        Returns where they end in `buffer`, and those among them that are no content. That costs a
        fraction of `receive`, to which the next one is left, malformed ones included. It follows
        MAX_RUN packets at the most.
        """
        noted: list[bytes] = []
        state = self._state
        row = self._runs.get(state)
        size = len(buffer)
        last = size - PAYLOAD  # where a packet can begin that has a letter
        head = HEAD.unpack_from
        left = MAX_RUN
        while row is not None and at <= last and left:
            left -= 1
            length, key = head(buffer, at)
            end = at + LENGTH_BYTES + length
            if end > size or not length:
                break
            if key == _MACRO and length > 1:
                key = _MACRO << 8 | buffer[at + PAYLOAD]
            known = row.get(key)
            if known is None:
                break
            after, start, counts, longest = known
            if counts is not None:
                start += at
                strings = buffer.count(0, start, end)
                if end < start or strings not in counts or (end > start and buffer[end - 1]):
                    break  # `receive` says what is wrong
            if longest is not None:
                if length > longest:
                    break
                noted.append(bytes(buffer[at:end]))
            if after is not state:
                state = after
                row = self._runs.get(state)
            at = end
        self._state = state
        return at, noted

    def decide(self, stage: Stage, replies: bytes) -> Decision:
        """Checks what is about to be sent as the answer at `stage`; moves on to the state after.

        `replies` are whole packets, any number of intermediate ones and one final. Raises
        LocalProtocolError, and changes nothing, when they must not reach the MTA.
        """
        if self._agreement is None:
            raise LocalProtocolError("nothing is negotiated yet")
        final = check_replies(stage, replies, self._agreement)
        after = AFTER_VERDICT.get(stage, {}).get(final)
        if after is not None:
            self._state = after
        refused = stage in (Stage.RCPT, Stage.DATA) and final in _REFUSALS
        return Decision(final, REFUSED if refused else b"", after is not None or stage is Stage.EOM)


def _name(code: int) -> str:
    return repr(bytes((code,)))[1:]
