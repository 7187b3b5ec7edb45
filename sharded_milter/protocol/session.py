"""The session: where a conversation stands, and what a command or a verdict does to it.

The law: which command is legal when, and what follows from it, is one constant table,
TRANSITIONS. A missing cell is a protocol error of the MTA. What follows from our verdicts is a
second one, AFTER_VERDICT; what becomes of macros a third, MACROS. No other code asks for the
state.

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
from sharded_milter.protocol.commands import Body, Header, Macro, Negotiate, check_command
from sharded_milter.protocol.negotiation import Agreement, Handling
from sharded_milter.protocol.replies import Accept, Discard, Reject, ReplyCode, TempFail
from sharded_milter.protocol.stages import NO_PROTOCOL, STAGES, Protocol, Stage
from sharded_milter.protocol.wire import HEAD, LENGTH_BYTES, LETTER, PAYLOAD

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


class _Known:
    """What commands do under an agreement, by the state before, in which they come.

    Working that out costs more than all the rest of a packet, and there are few of these.
    """

    def __init__(self) -> None:
        self.steps: dict[State, dict[int, tuple[State, Step]]] = {}  # the state after, the step
        # Of those that are only kept: the state after, and how many strings the payload is.
        self.runs: dict[State, dict[int, tuple[State, int]]] = {}


# The content of a message: a field is two strings, a piece of the body is anything.
_STRINGS = {Header.letter[0]: 2, Body.letter[0]: 0}
_TO_BE_CHECKED = -1  # by check_command


class Decision(NamedTuple):
    """What a verdict means for the transcript."""

    final: int  # the letter of the final reply
    mark: bytes  # what is kept behind a refused command, for whoever reads the transcript on
    ended: bool  # the message is over; its part of the transcript is of no more use


class Session:
    """One MTA connection's place in the protocol; no I/O."""

    __slots__ = ("_agreement", "_runs", "_steps", "state")

    def __init__(self) -> None:
        self.state = State.START
        self._agreement: Agreement | None = None
        self._steps: dict[State, dict[int, tuple[State, Step]]] = {}
        self._runs: dict[State, dict[int, tuple[State, int]]] = {}

    @property
    def agreement(self) -> Agreement:
        """What was negotiated; LocalProtocolError before that."""
        if self._agreement is None:
            raise LocalProtocolError("nothing is negotiated yet")
        return self._agreement

    def agree(self, agreement: Agreement) -> None:
        """Option negotiation ended with this."""
        self._agreement = agreement
        known = agreement.known.setdefault(_Known, _Known())
        self._steps, self._runs = known.steps, known.runs

    def receive(self, packet: bytes) -> Step:
        """What a whole packet of the MTA asks for; moves on to the state after it.

        Raises RemoteProtocolError, and changes nothing, when the packet is malformed or cannot
        come here. What was received is well-formed, and so are transcripts.
        """
        code = packet[LETTER]
        # A macro packet is told apart by the stage that it is for.
        key = code if code != _MACRO else _MACRO << 8 | packet[PAYLOAD] if packet[PAYLOAD:] else -1
        row = self._steps.get(self.state)
        known = row.get(key) if row is not None else None
        if known is None:
            return self._receive_first(code, key, packet)
        check_command(packet)
        self.state, step = known
        return step

    def receive_run(self, buffer: bytearray, at: int) -> tuple[int, list[bytes]]:
        """Follows the packets from `at` on that are only kept, as most of a message's are.

        Returns where they end in `buffer`, and those among them that are no content. That costs a
        fraction of `receive`, to which the next one is left. Raises RemoteProtocolError as that
        does.
        """
        noted: list[bytes] = []
        state = self.state
        row = self._runs.get(state)
        size = len(buffer)
        last = size - PAYLOAD  # where a packet can begin that has a letter
        head = HEAD.unpack_from
        while row is not None and at <= last:
            length, key = head(buffer, at)
            end = at + LENGTH_BYTES + length
            if end > size or not length:
                break
            if key == _MACRO and length > 1:
                key = _MACRO << 8 | buffer[at + PAYLOAD]
            known = row.get(key)
            if known is None:
                break
            after, strings = known
            if strings == _TO_BE_CHECKED:
                packet = bytes(buffer[at:end])
                check_command(packet)
                noted.append(packet)
            elif strings and (buffer.count(0, at + PAYLOAD, end) != strings or buffer[end - 1]):
                break  # `receive` says what is wrong
            if after is not state:
                state = after
                row = self._runs.get(state)
            at = end
        self.state = state
        return at, noted

    def _receive_first(self, code: int, key: int, packet: bytes) -> Step:
        before = self.state
        step = self._receive_macro(packet) if code == _MACRO else self._receive_command(packet)
        if step.offer is None and self._agreement is not None:
            self._steps.setdefault(before, {})[key] = self.state, step
            if step == Step(step.stage, keep=Keep.APPEND):
                strings = _STRINGS.get(code, _TO_BE_CHECKED)
                self._runs.setdefault(before, {})[key] = self.state, strings
        return step

    def _receive_command(self, packet: bytes) -> Step:
        code = packet[LETTER]
        cell = TRANSITIONS[self.state].get(code)
        if cell is None:
            raise RemoteProtocolError(f"{_name(code)} in state {self.state.name}")
        if cell.passes:
            self._check_passed(code, cell.passes)
        check_command(packet)
        stage = STAGES.get(code)
        if stage is None:
            self.state = cell.after
            offer = Negotiate.offer(packet[PAYLOAD:]) if code == _NEGOTIATE else None
            return Step(leaves=cell.leaves, offer=offer)
        agreement = self.agreement
        self.state = cell.after
        handling = agreement.handling[code]
        if handling is Handling.ASK and not cell.asked:
            handling = Handling.CONTINUE
        keep = cell.keep if code in agreement.recorded else Keep.NO
        return Step(stage, handling, keep, cell.leaves)

    def _check_passed(self, code: int, passes: Protocol) -> None:
        missing = passes & ~self.agreement.protocol
        if missing:
            raise RemoteProtocolError(
                f"{_name(code)} in state {self.state.name} without {missing.name}"
            )

    def _receive_macro(self, packet: bytes) -> Step:
        row = MACROS.get(self.state)
        if row is None:
            raise RemoteProtocolError(f"macros in state {self.state.name}")
        check_command(packet)
        cell = row.get(packet[PAYLOAD])
        if cell is None:
            return Step()
        self.state = cell.after
        return Step(keep=cell.keep, leaves=cell.leaves)

    def decide(self, stage: Stage, replies: bytes) -> Decision:
        """Checks what is about to be sent as the answer at `stage`; moves on to the state after.

        `replies` are whole packets, any number of intermediate ones and one final. Raises
        LocalProtocolError, and changes nothing, when they must not reach the MTA.
        """
        final = check_replies(stage, replies, self.agreement)
        after = AFTER_VERDICT.get(stage, {}).get(final)
        if after is not None:
            self.state = after
        refused = stage in (Stage.RCPT, Stage.DATA) and final in _REFUSALS
        return Decision(final, REFUSED if refused else b"", after is not None or stage is Stage.EOM)


def _name(code: int) -> str:
    return repr(bytes((code,)))[1:]
