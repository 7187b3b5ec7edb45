"""The session: every cell of the tables, compared with matrices written by hand."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.errors import LocalProtocolError, RemoteProtocolError
from sharded_milter.protocol.commands import Negotiate, parse_command
from sharded_milter.protocol.negotiation import (
    NO_REPLY_ALL,
    SUPPRESS_ALL,
    Agreement,
    Handling,
    Manifest,
    negotiate,
)
from sharded_milter.protocol.session import MACROS as MACRO_CELLS
from sharded_milter.protocol.session import (
    REFUSED,
    TRANSITIONS,
    Cell,
    Scope,
    Session,
    State,
    Step,
    TranscriptPart,
    compile_tables,
)
from sharded_milter.protocol.stages import NO_PROTOCOL, Protocol, Stage
from sharded_milter.protocol.wire import LETTER, frame

from .strategies import (
    OFFER,
    PACKETS,
    agreement,
    macro,
    packet,
    payloads,
    session_in,
)

# The effect of a command: the state after it, the part in which it is stored (`=` the connection's,
# `+` the message's, `^` a new message's), what it ends (`m` the message, `c` the client, `u` the
# connection), and `!` if no milter is asked. A dot is a protocol error. No stage is suppressed.
COMMANDS = """
           | O   | C      | H        | M       | R     | T     | L       | N       | B       | E            | U      | A        | Q       | K
START      | neg | .      | .        | .       | .     | .     | .       | .       | .       | .            | .      | .        | clo u   | .
NEGOTIATED | .   | con =  | .        | .       | .     | .     | .       | .       | .       | .            | neg    | neg m    | clo u   | neg c
CONNECTED  | .   | .      | con =    | mai +   | .     | .     | .       | .       | .       | .            | con    | con m    | clo u   | neg c
MAIL       | .   | .      | con = m  | mai ^ m | rcp + | .     | .       | .       | .       | .            | mai    | con m    | clo u   | neg c
RCPT       | .   | .      | con = m  | mai ^ m | rcp + | dat + | hea +   | bod +   | bod +   | con +        | rcp    | con m    | clo u   | neg c
DATA       | .   | .      | con = m  | mai ^ m | rcp + | dat + | hea +   | bod +   | bod +   | con +        | dat    | con m    | clo u   | neg c
HEADER     | .   | .      | con = m  | mai ^ m | .     | .     | hea +   | bod +   | bod +   | con +        | hea    | con m    | clo u   | neg c
BODY       | .   | .      | con = m  | mai ^ m | .     | .     | .       | .       | bod +   | con +        | bod    | con m    | clo u   | neg c
DECIDED    | .   | .      | con = m  | mai ^ m | dec ! | dec ! | dec !   | dec !   | dec !   | con m !      | dec    | con m    | clo u   | neg c
CLOSED     | .   | .      | .        | .       | .     | .     | .       | .       | .       | .            | .      | .        | .       | .
"""  # noqa: E501

# The effect of macros, by the letter of their stage. A dash is a packet that is dropped.
MACROS = """
           | C     | H     | M       | R     | T     | N     | E     | L | B | U | x
START      | .     | .     | .       | .     | .     | .     | .     | . | . | . | .
NEGOTIATED | neg = | neg = | neg ^   | neg + | neg + | neg + | neg + | - | - | - | -
CONNECTED  | con = | con = | con ^   | con + | con + | con + | con + | - | - | - | -
MAIL       | mai = | mai = | con ^ m | mai + | mai + | mai + | mai + | - | - | - | -
RCPT       | rcp = | rcp = | con ^ m | rcp + | rcp + | rcp + | rcp + | - | - | - | -
DATA       | dat = | dat = | con ^ m | dat + | dat + | dat + | dat + | - | - | - | -
HEADER     | hea = | hea = | con ^ m | hea + | hea + | hea + | hea + | - | - | - | -
BODY       | bod = | bod = | con ^ m | bod + | bod + | bod + | bod + | - | - | - | -
DECIDED    | dec = | dec = | con ^ m | -     | -     | -     | -     | - | - | - | -
CLOSED     | .     | .     | .       | .     | .     | .     | .     | . | . | . | .
"""

PARTS = {
    "=": TranscriptPart.CONNECTION,
    "+": TranscriptPart.MESSAGE,
    "^": TranscriptPart.NEW_MESSAGE,
}
ENDS = {"m": Scope.MESSAGE, "c": Scope.CLIENT, "u": Scope.CONNECTION}
STATES = {state.name[:3].lower(): state for state in State}
UNKNOWN_LETTERS = [chr(code) for code in range(256) if chr(code) not in {*PACKETS, "D"}]


def cells(matrix: str) -> list[tuple[State, str, str]]:
    """Return state, letter and expected effect of each cell."""
    header, *rows = [line.split("|") for line in matrix.strip("\n").splitlines()]
    columns = [letter.strip() for letter in header[1:]]
    return [
        (State[name.strip()], letter, cell.strip())
        for name, *row in rows
        for letter, cell in zip(columns, row, strict=True)
    ]


def outcome(state: State, step: Step) -> str:
    """Return a step in the notation of the matrices."""
    name = state.name[:3].lower()
    part = {part: sign for sign, part in PARTS.items()}.get(step.part, "")
    ends = {scope: sign for sign, scope in ENDS.items()}.get(step.ends, "")
    tolerated = "!" if step.handling is Handling.CONTINUE else ""
    return " ".join(filter(None, (name, part, ends, tolerated)))


def test_the_matrix_of_commands_has_every_state_and_every_letter() -> None:
    assert {(state, letter) for state, letter, _ in cells(COMMANDS)} == set(product(State, PACKETS))
    assert {state for state, _, _ in cells(MACROS)} == set(State)


def done(state: State, raw: bytes, agreed: Agreement | None = None) -> tuple[str, Step | None]:
    """Return the effect of a packet in a state, in the notation of the matrices, and the step."""
    session = session_in(state, agreed)
    try:
        step = session.receive(raw)
    except RemoteProtocolError as error:
        return "." if session.state is state and state.name in str(error) else str(error), None
    if (session.state, step) == (state, Step()):
        return "-", step
    return outcome(session.state, step), step


def test_a_command_does_what_its_cell_says() -> None:
    wrong = []
    for state, letter, expected in cells(COMMANDS):
        said, step = done(state, PACKETS[letter])
        if said != expected:
            wrong.append((state, letter, said))
        if step is not None:
            assert step.stage is next((s for s in Stage if s.value == letter.encode()), None)
            assert step.offer == (OFFER if letter == "O" else None)
    assert wrong == []


def test_macros_do_what_their_cell_says() -> None:
    wrong = []
    for state, letter, expected in cells(MACROS):
        said, step = done(state, macro(letter))
        if said != expected:
            wrong.append((state, letter, said))
        assert step is None or step.stage is None
    assert wrong == []


def test_what_is_compiled_is_what_the_tables_say() -> None:
    """Check every cell under every agreement about one stage, and the missing cells."""
    agreements = [
        agreement(NO_PROTOCOL),
        *(agreement(stage.suppress) for stage in Stage),
        *(agreement(stage.no_reply) for stage in Stage),
        agreement(SUPPRESS_ALL),
        agreement(NO_REPLY_ALL),
    ]
    wrong = []
    for agreed in agreements:
        steps = compile_tables(agreed).steps
        for state in State:
            wanted = {
                code: by_hand(code, cell, agreed)
                for code, cell in TRANSITIONS[state].items()
                if not cell.requires & ~agreed.protocol
            }
            for letter in range(256) if state in MACRO_CELLS else ():
                cell = MACRO_CELLS[state].get(letter, Cell(state))
                key = ord("D") << 8 | letter
                wanted[key] = (cell.after, Step(part=cell.part, ends=cell.ends))
            if dict(steps[state]) != wanted:
                wrong.append((agreed.protocol, state))
    assert wrong == []


def by_hand(code: int, cell: Cell, agreed: Agreement) -> tuple[State, Step]:
    """Return the state and step of a cell under an agreement."""
    stage = next((stage for stage in Stage if stage.code == code), None)
    if stage is None:
        return cell.after, Step(ends=cell.ends)
    handling = agreed.handling[code]
    if not cell.may_ask and handling is Handling.ASK:
        handling = Handling.CONTINUE
    keep = TranscriptPart.NONE if agreed.protocol & stage.suppress else cell.part
    return cell.after, Step(stage, handling, keep, cell.ends)


def test_a_run_takes_what_is_only_kept_and_nothing_else() -> None:
    for agreed in (agreement(NO_PROTOCOL), agreement(NO_REPLY_ALL), agreement(SUPPRESS_ALL)):
        tables = compile_tables(agreed)
        for state, letter in product(State, [*PACKETS, *(f"D{c}" for c in "CHMRTNELBUx")]):
            raw = PACKETS.get(letter) or macro(letter[1])
            session, other = session_in(state, agreed), session_in(state, agreed)
            buffer = bytearray(raw)
            taken = (
                session.receive_run(buffer, 0, len(buffer))[0] == len(raw)
                if state is not State.START
                else 0
            )
            try:
                step = other.receive(raw)
            except RemoteProtocolError:
                assert not taken
                continue
            if state is State.START:
                continue
            assert bool(taken) == (step == Step(step.stage, part=TranscriptPart.MESSAGE))
            if taken:
                assert session.state is other.state
            key = raw[LETTER] if len(letter) == 1 else raw[LETTER] << 8 | ord(letter[1])
            assert (key in tables.runs[state]) == bool(taken)


def test_an_agreement_is_compiled_once() -> None:
    agreed = agreement()
    assert compile_tables(agreed) is compile_tables(agreed)


def test_where_the_mta_is_is_for_the_session_alone_to_say() -> None:
    session = session_in(State.MAIL)
    with pytest.raises(AttributeError):
        session.state = State.RCPT  # type: ignore[misc]
    assert not session.is_closed
    session.close()
    assert session.is_closed
    assert session.state is State.CLOSED


@pytest.mark.parametrize("state", State)
def test_a_letter_that_is_no_command_is_an_error_everywhere(state: State) -> None:
    session = session_in(state)
    for letter in UNKNOWN_LETTERS:
        with pytest.raises(RemoteProtocolError):
            session.receive(packet(letter))
        assert session.state is state


@pytest.mark.parametrize("state", [state for state in State if state is not State.START])
def test_a_second_negotiation_is_fatal(state: State) -> None:
    with pytest.raises(RemoteProtocolError, match="'O'"):
        session_in(state).receive(PACKETS["O"])


# Suppressed stages that a command skips

# The stages between a state and a command, which must all be suppressed.
NEEDED: dict[State, dict[str, tuple[str, ...]]] = {
    State.NEGOTIATED: {
        "H": ("CONNECT",),
        "M": ("CONNECT",),
        "R": ("CONNECT", "MAIL"),
        **dict.fromkeys("TLNBE", ("CONNECT", "MAIL", "RCPT")),
    },
    State.CONNECTED: {"R": ("MAIL",), **dict.fromkeys("TLNBE", ("MAIL", "RCPT"))},
    State.MAIL: dict.fromkeys("TLNBE", ("RCPT",)),
}
AFTER = {
    "H": State.CONNECTED,
    "M": State.MAIL,
    "R": State.RCPT,
    "T": State.DATA,
    "L": State.HEADER,
    "N": State.BODY,
    "B": State.BODY,
    "E": State.CONNECTED,
}
SUPPRESSIBLE = ("CONNECT", "HELO", "MAIL", "RCPT", "DATA", "HEADER", "EOH", "BODY", "UNKNOWN")


def test_a_stage_is_passed_over_only_if_it_was_suppressed() -> None:
    wrong = []
    for suppressed in product((False, True), repeat=len(SUPPRESSIBLE)):
        chosen = {name for name, chosen in zip(SUPPRESSIBLE, suppressed, strict=True) if chosen}
        agreed = agreement(sum(Protocol[f"NO_{name}"] for name in chosen))
        for state, row in NEEDED.items():
            for letter, needed in row.items():
                session = session_in(state, agreed)
                allowed, why = chosen.issuperset(needed), ""
                try:
                    session.receive(PACKETS[letter])
                except RemoteProtocolError as error:
                    why = str(error)
                after = AFTER[letter] if allowed else state
                if session.state is not after or (" without NO_" in why) is allowed:
                    wrong.append((chosen, state, letter, session.state, why))
    assert wrong == []


@pytest.mark.parametrize("stage", [s for s in Stage if s not in (Stage.EOM, Stage.UNKNOWN)])
def test_what_no_milter_needs_is_answered_but_not_kept(stage: Stage) -> None:
    """An MTA may send a stage that it agreed to suppress, or did not offer to suppress."""
    agreed = agreement(stage.suppress)
    for state in State:
        session = session_in(state, agreed)
        try:
            step = session.receive(PACKETS[stage.value.decode()])
        except RemoteProtocolError:
            continue
        assert step.part is TranscriptPart.NONE
        assert step.handling is Handling.CONTINUE


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.EOM])
def test_a_stage_without_reply_is_kept_and_never_answered(stage: Stage) -> None:
    agreed = agreement(stage.no_reply)
    for state in State:
        session = session_in(state, agreed)
        normal = session_in(state)
        try:
            step = session.receive(PACKETS[stage.value.decode()])
        except RemoteProtocolError:
            continue
        assert step.handling is Handling.NO_REPLY
        assert step.part is normal.receive(PACKETS[stage.value.decode()]).part


# Verdicts

FINAL = {
    "c": packet("c"),
    "a": packet("a"),
    "r": packet("r"),
    "t": packet("t"),
    "d": packet("d"),
    "y": packet("y", b"550 5.7.1 no\0"),
    "s": packet("s"),
}
# The state at the time of the question and after each verdict. A dash is a verdict that must not be
# sent; `*` after a state means that the message is over.
VERDICTS = """
        | before     | c     | a     | r     | t     | y     | d     | s
CONNECT | CONNECTED  | con   | con   | con   | con   | con   | -     | -
HELO    | CONNECTED  | con   | con   | con   | con   | con   | -     | -
MAIL    | MAIL       | mai   | dec * | con * | con * | con * | dec * | -
RCPT    | RCPT       | rcp   | dec * | rcp   | rcp   | rcp   | dec * | -
DATA    | DATA       | dat   | dec * | dat   | dat   | dat   | dec * | -
HEADER  | HEADER     | hea   | dec * | dec * | dec * | dec * | dec * | -
EOH     | BODY       | bod   | dec * | dec * | dec * | dec * | dec * | -
BODY    | BODY       | bod   | dec * | dec * | dec * | dec * | dec * | bod
EOM     | CONNECTED  | con * | con * | con * | con * | con * | con * | -
UNKNOWN | RCPT       | rcp   | -     | rcp   | rcp   | rcp   | -     | -
"""


def verdict_cells() -> list[tuple[Stage, State, str, str]]:
    header, *rows = [line.split("|") for line in VERDICTS.strip("\n").splitlines()]
    return [
        (Stage[name.strip()], State[before.strip()], letter.strip(), cell.strip())
        for name, before, *row in rows
        for letter, cell in zip(header[2:], row, strict=True)
    ]


def test_the_matrix_of_verdicts_has_every_stage_and_every_final_reply() -> None:
    assert {(stage, letter) for stage, _, letter, _ in verdict_cells()} == set(
        product(Stage, FINAL)
    )


def decided(stage: Stage, before: State, letter: str) -> str:
    """Return the effect of a verdict, in the notation of the matrix."""
    session = session_in(before, agreement(Protocol.SKIP))
    try:
        decision = session.decide(stage, FINAL[letter])
    except LocalProtocolError as error:
        told = session.state is before and f"'{letter}' is not legal at {stage.word}" in str(error)
        return "-" if told else str(error)
    assert decision.final == ord(letter)
    refused = stage in (Stage.RCPT, Stage.DATA) and letter in "rty"
    assert decision.mark == (REFUSED if refused else b"")
    return f"{session.state.name[:3].lower()}{' *' if decision.ended else ''}"


def test_a_verdict_does_what_its_cell_says() -> None:
    assert [cell for cell in verdict_cells() if decided(*cell[:3]) != cell[3]] == []


def test_a_verdict_that_must_not_be_sent_changes_nothing() -> None:
    session = session_in(State.MAIL)
    with pytest.raises(LocalProtocolError):
        session.decide(Stage.MAIL, FINAL["r"] + FINAL["r"])
    assert session.state is State.MAIL


# Negotiation


def test_nothing_but_the_negotiation_can_come_before_an_agreement() -> None:
    session = Session()
    with pytest.raises(LocalProtocolError, match="nothing is negotiated"):
        _ = session.agreement
    session.receive(PACKETS["O"])
    with pytest.raises(LocalProtocolError, match="nothing is negotiated"):
        session.receive(PACKETS["C"])
    session.agree(agreement())
    assert session.receive(PACKETS["C"]).stage is Stage.CONNECT


def test_a_short_offer_changes_nothing() -> None:
    session = Session()
    with pytest.raises(RemoteProtocolError, match="needs 12"):
        session.receive(packet("O", b"\0\0\0\6\0\0"))
    assert session.state is State.START


# Hostile input

MALFORMED = [
    packet("C", b"host\0"),
    packet("C", b"host\x004\x00\x19192.0.2.1"),
    packet("H", b"client"),
    packet("H", b""),
    packet("H", b"two\0strings\0"),
    packet("M", b"<a@b>"),
    packet("M", b""),
    packet("R", b"<a@b>\0NOTIFY=NEVER"),
    packet("T", b"x\0"),
    packet("L", b"Subject\0"),
    packet("L", b"Subject\0hi"),
    packet("L", b"Subject\0hi\0more\0"),
    packet("N", b"\0"),
    packet("U", b"XYZZY"),
    packet("D", b""),
    packet("D", b"Ci\0"),
    packet("D", b"Mi\0value"),
    packet("D", b"Rno nul"),
    packet("A", b"\0"),
    packet("Q", b"bye\0"),
    packet("K", b"x"),
]


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("raw", MALFORMED)
def test_what_cannot_be_parsed_later_is_refused_at_once(state: State, raw: bytes) -> None:
    session = session_in(state)
    with pytest.raises(RemoteProtocolError):
        session.receive(raw)
    assert session.state is state


@given(st.lists(st.tuples(st.sampled_from([*PACKETS, "D"]), payloads), max_size=30))
def test_whatever_is_kept_can_be_parsed(attempts: list[tuple[str, bytes]]) -> None:
    session = Session()
    for letter, payload in attempts:
        for raw in (packet(letter, payload), PACKETS.get(letter, macro("M"))):
            before = session.state
            try:
                step = session.receive(raw)
            except RemoteProtocolError:
                assert session.state is before
                continue
            if step.offer:
                session.agree(agreement())
            if step.part is not TranscriptPart.NONE or step.stage is not None:
                parse_command(raw)


@given(
    st.integers(0, 0x1FFFFF),
    st.lists(
        st.tuples(
            st.sampled_from([*PACKETS, *(f"D{c}" for c in "CHMRTNEL")]),
            st.sampled_from("cartdy"),
        ),
        max_size=40,
    ),
)
def test_no_message_reaches_a_milter_without_the_stages_it_needs(
    protocol: int, conversation: list[tuple[str, str]]
) -> None:
    """When milters are asked, the transcript has every packet that had to be sent."""
    agreed = agreement(protocol)
    session = session_in(State.NEGOTIATED, agreed)
    needed = {
        "C": Protocol.NO_CONNECT,
        "M": Protocol.NO_MAIL,
        "R": Protocol.NO_RCPT,
    }
    before = {"R": "CM", "T": "CMR", "L": "CMR", "N": "CMR", "B": "CMR", "E": "CMR", "M": "C"}
    client: set[str] = set()
    message: set[str] = set()
    for letter, reply in conversation:
        raw = macro(letter[1]) if letter[0] == "D" else PACKETS[letter]
        try:
            step = session.receive(raw)
        except RemoteProtocolError:
            continue
        if step.ends in (Scope.MESSAGE, Scope.CLIENT):
            message.clear()
        if step.ends is Scope.CLIENT:
            client.clear()
        match step.part:
            case TranscriptPart.CONNECTION:
                client.add(letter)
            case TranscriptPart.NEW_MESSAGE:
                message = {letter}
            case TranscriptPart.MESSAGE:
                message.add(letter)
            case TranscriptPart.NONE:
                pass
        if step.stage is None or step.handling is not Handling.ASK:
            continue
        for earlier in before.get(letter, ""):
            assert earlier in client | message or agreed.protocol & needed[earlier]
        try:
            decision = session.decide(step.stage, FINAL[reply])
        except LocalProtocolError:
            decision = session.decide(step.stage, FINAL["c"])
        if decision.ended:
            message.clear()


def test_macros_of_a_decided_message_are_not_collected() -> None:
    session = session_in(State.DECIDED)
    assert {session.receive(macro(stage)).part for stage in "RTNE"} == {TranscriptPart.NONE}
    assert session.state is State.DECIDED


def test_nothing_is_taken_after_the_end() -> None:
    session = session_in(State.CONNECTED)
    session.receive(PACKETS["Q"])
    for raw in (*PACKETS.values(), macro("C"), macro("M")):
        with pytest.raises(RemoteProtocolError, match="CLOSED"):
            session.receive(raw)


def test_every_packet_of_the_tests_has_its_letter_in_its_place() -> None:
    assert all(raw[LETTER] == ord(letter) for letter, raw in PACKETS.items())


def test_a_run_ends_before_what_is_more_than_kept() -> None:
    session, offer = Session(), Negotiate(6, 0x1FF, 0x1FFFFF)
    nobody_answers = sum((stage.no_reply for stage in Stage), NO_PROTOCOL)
    session.receive(offer.encode())
    session.agree(negotiate(offer, [Manifest("runs", protocol=nobody_answers)]))
    conversation = [
        frame(b"C", b"client\0U"), frame(b"M", b"<a>\0"), frame(b"R", b"<b>\0"),
        frame(b"D", b"N"), frame(b"L", b"a\0b\0"), frame(b"D"),
    ]  # fmt: skip
    for command in conversation[:5]:  # the tables are compiled on first use
        session.receive(command)
    session.receive(frame(b"A"))
    run, rest = b"".join(conversation[1:5]), conversation[5]
    agreed = session.agreement
    for more in (rest, rest[:3], conversation[4][:-1], frame(b"L"), frame(b"L", b"a\0b\0c"), b""):
        session = session_in(State.CONNECTED, agreed)
        buffer = bytearray(b"before" + run + more + b"stale")
        end, noted = session.receive_run(buffer, len(b"before"), len(buffer) - len(b"stale"))
        assert end == len(b"before" + run)
        assert noted == conversation[1:4]
    with pytest.raises(RemoteProtocolError):
        session.receive(rest)
