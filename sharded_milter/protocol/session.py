"""The session: the state of one MTA connection, and how commands and verdicts change it.

Three constant tables define the state machine. TRANSITIONS says which command is legal in which
state and what it does; a missing cell is a protocol error of the MTA. AFTER_VERDICT has the state
after each of our verdicts. MACROS says what is done with macro packets. `compile_tables` derives
from them the effect of each packet under one agreement. No other code assigns or compares the
state. That is why the tables and the code that reads them stay in this one file, though it is long.

The state is the MTA's position in a message. MTAs leave out the stages that were suppressed, so
a command may skip stages if their NO bits were negotiated (`Cell.requires`); DATA, HEADER, EOH and
BODY may be missing from any message. The tables follow what Postfix and Sendmail were observed to
do, which is more than libmilter allows.
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
    """The MTA's position in the conversation."""

    __hash__ = object.__hash__  # each member exists once; Enum's own hash is a Python call

    START = auto()  # no command has come
    NEGOTIATED = auto()  # options are agreed, no client yet
    CONNECTED = auto()  # a client is connected, no message is open
    MAIL = auto()  # the sender has come
    RCPT = auto()  # a recipient has come
    DATA = auto()  # DATA has come
    HEADER = auto()  # a header field has come
    BODY = auto()  # the end of the headers, or a part of the body, has come
    DECIDED = auto()  # the message got its final verdict before its end
    CLOSED = auto()  # the connection is over


class TranscriptPart(Enum):
    """The part of the transcript in which a packet is stored."""

    NONE = auto()  # it is not stored
    CONNECTION = auto()  # the connection's part, where it replaces the last packet of its kind
    MESSAGE = auto()  # the end of the message's part
    NEW_MESSAGE = auto()  # the beginning of a new message's part


class Scope(Enum):
    """How much of a conversation a packet ends or a verdict is about."""

    NONE = auto()
    MESSAGE = auto()  # the current message
    CLIENT = auto()  # the SMTP client's session; another may follow on this connection
    CONNECTION = auto()  # the MTA's connection


@dataclass(frozen=True, slots=True)
class Cell:
    """The effect of a command in one state."""

    after: State
    part: TranscriptPart = TranscriptPart.NONE  # where the command is stored
    ends: Scope = Scope.NONE
    requires: Protocol = NO_PROTOCOL  # NO bits of the stages that it skips
    may_ask: bool = True  # the milters may be asked; if not, the reply is CONTINUE


def _codes(row: Mapping[bytes, Cell]) -> Mapping[int, Cell]:
    return {letter[0]: cell for letter, cell in row.items()}


def _content(requires: Protocol = NO_PROTOCOL) -> dict[bytes, Cell]:
    """Return the cells of a message's content."""
    return {
        b"L": Cell(State.HEADER, TranscriptPart.MESSAGE, requires=requires),
        b"N": Cell(State.BODY, TranscriptPart.MESSAGE, requires=requires),
        b"B": Cell(State.BODY, TranscriptPart.MESSAGE, requires=requires),
        b"E": Cell(State.CONNECTED, TranscriptPart.MESSAGE, requires=requires),
    }


def _no_message(stay: State, requires: Protocol = NO_PROTOCOL) -> dict[bytes, Cell]:
    """Return the cells of a state without a message: one may begin, at any stage."""
    to_rcpt = requires | Protocol.NO_MAIL
    return {
        b"H": Cell(State.CONNECTED, TranscriptPart.CONNECTION, requires=requires),
        b"M": Cell(State.MAIL, TranscriptPart.MESSAGE, requires=requires),
        b"R": Cell(State.RCPT, TranscriptPart.MESSAGE, requires=to_rcpt),
        b"T": Cell(State.DATA, TranscriptPart.MESSAGE, requires=to_rcpt | Protocol.NO_RCPT),
        **_content(to_rcpt | Protocol.NO_RCPT),
        b"U": Cell(stay),
        # Postfix sends ABORT after every message, also after those that it delivered.
        b"A": Cell(stay, ends=Scope.MESSAGE),
        b"Q": Cell(State.CLOSED, ends=Scope.CONNECTION),
        b"K": Cell(State.NEGOTIATED, ends=Scope.CLIENT),
    }


def _message(stay: State) -> dict[bytes, Cell]:
    """Return the cells of a state with an open message.

    HELO ends it (Postfix sends its ABORT only afterwards), and so does MAIL (Sendmail sends no
    ABORT when MAIL went unanswered).
    """
    return {
        b"H": Cell(State.CONNECTED, TranscriptPart.CONNECTION, Scope.MESSAGE),
        b"M": Cell(State.MAIL, TranscriptPart.NEW_MESSAGE, Scope.MESSAGE),
        b"U": Cell(stay),
        b"A": Cell(State.CONNECTED, ends=Scope.MESSAGE),
        b"Q": Cell(State.CLOSED, ends=Scope.CONNECTION),
        b"K": Cell(State.NEGOTIATED, ends=Scope.CLIENT),
    }


_RCPT = {b"R": Cell(State.RCPT, TranscriptPart.MESSAGE)}
_DATA = {b"T": Cell(State.DATA, TranscriptPart.MESSAGE)}

TRANSITIONS: Mapping[State, Mapping[int, Cell]] = {
    State.START: _codes(
        {b"O": Cell(State.NEGOTIATED), b"Q": Cell(State.CLOSED, ends=Scope.CONNECTION)}
    ),
    State.NEGOTIATED: _codes(
        {
            **_no_message(State.NEGOTIATED, Protocol.NO_CONNECT),
            b"C": Cell(State.CONNECTED, TranscriptPart.CONNECTION),
        }
    ),
    State.CONNECTED: _codes(_no_message(State.CONNECTED)),
    State.MAIL: _codes(
        {
            **_message(State.MAIL),
            **_RCPT,
            b"T": Cell(State.DATA, TranscriptPart.MESSAGE, requires=Protocol.NO_RCPT),
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
            b"B": Cell(State.BODY, TranscriptPart.MESSAGE),
            b"E": Cell(State.CONNECTED, TranscriptPart.MESSAGE),
        }
    ),
    # No MTA sends more of a message after a final verdict. If one does, it gets CONTINUE.
    State.DECIDED: _codes(
        {
            **_message(State.DECIDED),
            **dict.fromkeys((b"R", b"T", b"L", b"N", b"B"), Cell(State.DECIDED, may_ask=False)),
            b"E": Cell(State.CONNECTED, ends=Scope.MESSAGE, may_ask=False),
        }
    ),
    State.CLOSED: {},
}


def _macros(
    stay: State, begin: Cell, part: TranscriptPart = TranscriptPart.MESSAGE
) -> Mapping[int, Cell]:
    """Return the row of a state: MAIL's macros do `begin`, later ones go to `part`."""
    slot = Cell(stay, TranscriptPart.CONNECTION)
    return _codes(
        {
            b"C": slot,
            b"H": slot,
            b"M": begin,
            **dict.fromkeys((b"R", b"T", b"N", b"E"), Cell(stay, part)),
        }
    )


_BEGIN = Cell(State.CONNECTED, TranscriptPart.NEW_MESSAGE, Scope.MESSAGE)

# Macros come before their command, or without it if the command is suppressed or the MTA itself
# refused it. The macros of MAIL begin a message. A missing row is a protocol error of the MTA.
# Macros for a letter that is missing in a row (Postfix sends L, B and U) repeat the others; they
# are dropped, as libmilter does.
MACROS: Mapping[State, Mapping[int, Cell]] = {
    **{
        state: _macros(state, Cell(state, TranscriptPart.NEW_MESSAGE))
        for state in (State.NEGOTIATED, State.CONNECTED)
    },
    **{
        state: _macros(state, _BEGIN)
        for state in (State.MAIL, State.RCPT, State.DATA, State.HEADER, State.BODY)
    },
    State.DECIDED: _macros(State.DECIDED, _BEGIN, TranscriptPart.NONE),
}

_REFUSALS = frozenset(kind.letter[0] for kind in (Reject, TempFail, ReplyCode))
_ENDINGS = frozenset(kind.letter[0] for kind in (Accept, Discard))

# The state after a verdict other than CONTINUE and SKIP. A missing cell: the state stays.
AFTER_VERDICT: Mapping[Stage, Mapping[int, State]] = {
    Stage.MAIL: {
        **dict.fromkeys(_REFUSALS, State.CONNECTED),
        **dict.fromkeys(_ENDINGS, State.DECIDED),
    },
    # A refusal is of this recipient or DATA command only; the message stays open.
    Stage.RCPT: dict.fromkeys(_ENDINGS, State.DECIDED),
    Stage.DATA: dict.fromkeys(_ENDINGS, State.DECIDED),
    **dict.fromkeys(
        (Stage.HEADER, Stage.EOH, Stage.BODY),
        dict.fromkeys(_REFUSALS | _ENDINGS, State.DECIDED),
    ),
}


# Follows a refused RCPT or DATA in the transcript, whatever the text of the refusal was.
REFUSED = Reject().encode()


@dataclass(frozen=True, slots=True)
class Step:
    """The actions for one packet, in this order: `ends`, `part`, `handling`."""

    stage: Stage | None = None  # set if the MTA may wait for a reply
    handling: Handling = Handling.NO_REPLY
    part: TranscriptPart = TranscriptPart.NONE
    ends: Scope = Scope.NONE
    offer: Negotiate | None = None  # set if the MTA offers options and waits for ours


# Packets that one call of `receive_run` reads. They take about a millisecond, during which the
# other connections wait. A message of 100 header fields and 100 body chunks of 64 KB is one run.
MAX_RUN = 2000

# The transcript needs nothing from these packets, and may need something from all others.
_CONTENT = frozenset((Header.letter[0], Body.letter[0]))


def _macro_key(letter: int) -> int:
    """Return the key of a macro packet for the command with this letter."""
    return _MACRO << 8 | letter


class Run(NamedTuple):
    """A packet that is only stored: the state after it, its shape and its maximum length.

    `counts` is None if the payload may be anything; `start` is then where the payload begins.
    `longest`, in bytes, is None for content.
    """

    after: State
    start: int
    counts: range | None
    longest: int | None


class Compiled(NamedTuple):
    """The effect of each packet under one agreement, by state and by key.

    The key is the packet's letter, or `_macro_key` for a macro packet. `steps` has the state after
    the packet and the step to take. `runs` has the packets that are only stored. A packet whose key
    is missing is illegal in that state.
    """

    steps: Mapping[State, Mapping[int, tuple[State, Step]]]
    runs: Mapping[State, Mapping[int, Run]]


def compile_tables(agreement: Agreement) -> Compiled:
    """Return the tables above as they apply under an agreement; cached in the agreement."""
    tables: Compiled | None = agreement.cache.get(Compiled)
    if tables is None:
        steps = {state: _steps_in(state, agreement) for state in State}
        runs = {state: _runs_in(row) for state, row in steps.items()}
        for state, (macro_steps, macro_runs) in _OF_MACROS.items():
            steps[state].update(macro_steps)
            runs[state].update(macro_runs)
        tables = agreement.cache[Compiled] = Compiled(steps, runs)
    return tables


def _steps_in(state: State, agreement: Agreement) -> dict[int, tuple[State, Step]]:
    return {
        code: (cell.after, _step(code, cell, agreement))
        for code, cell in TRANSITIONS[state].items()
        if not cell.requires & ~agreement.protocol
    }


def _runs_in(row: Mapping[int, tuple[State, Step]]) -> dict[int, Run]:
    return {
        key: _run(key, after)
        for key, (after, step) in row.items()
        if step == Step(step.stage, part=TranscriptPart.MESSAGE)
    }


def _run(key: int, after: State) -> Run:
    letter = key >> 8 or key
    start, counts = SHAPES.get(letter, (PAYLOAD, None))
    longest = None if letter in _CONTENT else LONGEST.get(letter, MAX_PACKET)
    return Run(after, start, counts, longest)


def _macro_steps(state: State) -> dict[int, tuple[State, Step]]:
    cells = ((letter, MACROS[state].get(letter, Cell(state))) for letter in range(256))
    return {
        _macro_key(letter): (cell.after, Step(part=cell.part, ends=cell.ends))
        for letter, cell in cells
    }


# The steps and the runs of macro packets, which are the same under every agreement.
_OF_MACROS = {
    state: (steps, _runs_in(steps)) for state in MACROS for steps in (_macro_steps(state),)
}


def _step(code: int, cell: Cell, agreement: Agreement) -> Step:
    stage = STAGES.get(code)
    if stage is None:
        return Step(ends=cell.ends)
    handling = agreement.handling[code]
    if handling is Handling.ASK and not cell.may_ask:
        handling = Handling.CONTINUE
    part = cell.part if code in agreement.recorded else TranscriptPart.NONE
    return Step(stage, handling, part, cell.ends)


# The tables before option negotiation.
_AT_START = Compiled(
    {
        State.START: {
            code: (cell.after, Step(ends=cell.ends))
            for code, cell in TRANSITIONS[State.START].items()
        }
    },
    {},
)


class Decision(NamedTuple):
    """The effect of a verdict on the transcript."""

    final: int  # the letter of the final reply
    mark: bytes  # a packet to store after a refused command, or empty
    ended: bool  # the message is over; its part of the transcript is not needed any more


class Session:
    """The protocol state of one MTA connection; no I/O."""

    __slots__ = ("_agreement", "_runs", "_state", "_steps")

    def __init__(self, state: State = State.START) -> None:
        self._state = state
        self._agreement: Agreement | None = None
        self._steps, self._runs = _AT_START

    @property
    def state(self) -> State:
        """The MTA's position in the conversation."""
        return self._state

    @property
    def is_closed(self) -> bool:
        """True once the connection is over; no command is legal then."""
        return self._state is State.CLOSED

    @property
    def agreement(self) -> Agreement:
        """The result of option negotiation. Raise LocalProtocolError before it."""
        if self._agreement is None:
            raise LocalProtocolError("nothing is negotiated yet")
        return self._agreement

    def agree(self, agreement: Agreement) -> None:
        """Set the result of option negotiation."""
        self._agreement = agreement
        self._steps, self._runs = compile_tables(agreement)

    def close(self) -> None:
        """Set the final state: no command may follow."""
        self._state = State.CLOSED

    def receive(self, packet: bytes) -> Step:
        """Check one whole packet of the MTA, enter the state after it, and return the step to take.

        Raise RemoteProtocolError, and change nothing, if the packet is malformed or illegal in this
        state. So transcripts hold well-formed packets only.
        """
        code = packet[LETTER]
        if code == _MACRO:
            code = _MACRO << 8 | (packet[PAYLOAD] if len(packet) > PAYLOAD else 0)
        row = self._steps.get(self._state)
        found = row.get(code) if row is not None else None
        if found is None:
            raise self._illegal(code)
        check_command(packet)
        offer = Negotiate.offer(packet[PAYLOAD:]) if code == _NEGOTIATE else None
        self._state, step = found
        return step if offer is None else Step(offer=offer)

    def _illegal(self, code: int) -> RemoteProtocolError:
        """Return the error for a packet that is illegal in this state."""
        state = self._state.name
        if code > 255:
            return RemoteProtocolError(f"macros in state {state}")
        cell = TRANSITIONS[self._state].get(code)
        if cell is None:
            return RemoteProtocolError(f"{_name(code)} in state {state}")
        missing = cell.requires & ~self.agreement.protocol
        return RemoteProtocolError(f"{_name(code)} in state {state} without {missing.name}")

    def receive_run(self, buffer: bytearray, at: int, size: int) -> tuple[int, list[bytes]]:
        """Read the packets from offset `at` to `size` that are only stored, as most of a message's.

        Return the offset in `buffer` at which they end, and the packets among them that are not
        content. Read MAX_RUN packets at most. This costs a fraction of `receive`, which must take
        the packet that follows and raises its error if that is malformed.
        """
        noted: list[bytes] = []
        state = self._state
        row = self._runs.get(state)
        last = size - PAYLOAD  # the last offset at which a packet with a letter can begin
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
            found = row.get(key)
            if found is None:
                break
            after, start, counts, longest = found
            if counts is not None:
                start += at
                strings = buffer.count(0, start, end)
                if end < start or strings not in counts or (end > start and buffer[end - 1]):
                    break  # `receive` raises the error
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
        """Check the replies that are about to be sent at `stage`, and enter the state after them.

        `replies` are whole packets: any number of intermediate ones, then one final reply. Raise
        LocalProtocolError, and change nothing, if they must not reach the MTA.
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
