"""What Postfix and Sendmail really sent and took (tests/captures), through framing and session."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
from cells import every, rows

from sharded_milter.errors import LocalProtocolError
from sharded_milter.protocol.commands import Negotiate, parse_command
from sharded_milter.protocol.negotiation import Handling
from sharded_milter.protocol.replies import parse_reply
from sharded_milter.protocol.session import Session, State
from sharded_milter.protocol.stages import STAGES, Protocol, Stage
from sharded_milter.protocol.wire import LETTER, PAYLOAD, Framer, packets

from .strategies import obeyed, packet, sliced

FOLDER = Path(__file__).parent.parent / "captures"

# Dripping a stream in costs a call a byte; large ones gain nothing over small ones.
DRIP_BELOW = 10_000
RANDOM_CUTS = 20

# The letters that an MTA waits for an answer to, unless agreed otherwise.
ANSWERED = "CHMRTLNBEU"
NEVER_ANSWERED = "DAQK"
FINAL = "cartyds"


@dataclass(frozen=True)
class Recorded:
    """A packet as the recorder saw it."""

    from_mta: bool
    letter: str
    raw: bytes


@cache
def listing() -> dict[str, list[str]]:
    text = (FOLDER / "packets.json").read_text(encoding="utf-8")
    return {name: capture["packets"] for name, capture in json.loads(text).items()}


NAMES = sorted(listing())
STREAMS = [(name, direction) for name in NAMES for direction in ("c2f", "f2c")]


def stream(name: str, direction: str) -> bytes:
    return (FOLDER / f"{name}.{direction}.bin").read_bytes()


def recorded(name: str) -> list[Recorded]:
    """The dialogue in the order of time, its packets cut by the recorder's list."""
    streams = {">": stream(name, "c2f"), "<": stream(name, "f2c")}
    dialogue = []
    for entry in listing()[name]:
        direction, offset, letter, size = entry.split(" ")
        start = int(offset)
        raw = streams[direction][start : start + PAYLOAD + int(size)]
        dialogue.append(Recorded(direction == ">", letter, raw))
    return dialogue


def expected(name: str, direction: str) -> list[bytes]:
    return [p.raw for p in recorded(name) if p.from_mta is (direction == "c2f")]


def framed(pieces: list[bytes]) -> list[bytes]:
    framer = Framer()
    return [packet for piece in pieces for packet in framer.receive(piece)]


def test_all_captures_are_there_and_fit_into_the_repository() -> None:
    files = {path.name for path in FOLDER.glob("*.bin")}
    assert files == {f"{name}.{direction}.bin" for name, direction in STREAMS}
    assert len(NAMES) == 83
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


@rows(STREAMS)
def test_a_stream_is_framed_alike_however_it_arrives(name: str, direction: str) -> None:
    data, packets_ = stream(name, direction), expected(name, direction)
    assert b"".join(packets_) == data
    assert framed([data]) == packets_
    assert framed([data + b"\0\0", b"\0"]) == packets_
    if len(data) < DRIP_BELOW:
        assert framed([data[i : i + 1] for i in range(len(data))]) == packets_
    chance = random.Random(name + direction)
    for _ in range(RANDOM_CUTS):
        cuts = [chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 40))]
        assert framed(sliced(data, cuts)) == packets_


@rows(STREAMS)
def test_the_packets_of_a_stream_are_found_in_place(name: str, direction: str) -> None:
    data = stream(name, direction)
    found = list(packets(memoryview(data)))
    assert [bytes((letter,)) + data[start:end] for letter, start, end in found] == [
        raw[LETTER:] for raw in expected(name, direction)
    ]


@every(NAMES)
def test_every_packet_is_read_without_loss(name: str) -> None:
    for entry in recorded(name):
        parse = parse_command if entry.from_mta or entry.letter == "O" else parse_reply
        assert parse(entry.raw).encode() == entry.raw


@every(NAMES)
def test_the_session_follows_what_was_negotiated_and_answered(name: str) -> None:
    """One question for each command that the MTA waits at, and the MTA's own bytes as answers."""
    dialogue = recorded(name)
    reply = Negotiate.parse(next(p for p in dialogue if not p.from_mta).raw[PAYLOAD:])
    protocol = Protocol(reply.protocol)
    session = Session()
    for position, entry in enumerate(dialogue):
        if not entry.from_mta:
            continue
        answer = list(takewhile(lambda p: not p.from_mta, dialogue[position + 1 :]))
        step = session.receive(entry.raw)
        if entry.letter == "O":
            assert step.offer == Negotiate.parse(entry.raw[PAYLOAD:])
            session.agree(obeyed(reply))
            continue
        if entry.letter in NEVER_ANSWERED:
            assert (step.stage, step.handling) == (None, Handling.NO_REPLY)
            continue
        stage = STAGES[ord(entry.letter)]
        assert step.stage is stage
        silent = bool(protocol & stage.no_reply)
        assert silent is not answered(dialogue, position)
        assert step.handling is (Handling.NO_REPLY if silent else Handling.ASK)
        if not silent:
            assert [p.letter for p in answer][-1] in FINAL
            decide(session, stage, b"".join(p.raw for p in answer))
    assert session.state is final_state(dialogue)


def answered(dialogue: list[Recorded], position: int) -> bool:
    """Whether the milter of the recording answered the command before the MTA went on."""
    return position + 1 < len(dialogue) and not dialogue[position + 1].from_mta


def decide(session: Session, stage: Stage, replies: bytes) -> None:
    """What was answered; the recordings with a SKIP before the body show why we do not send it."""
    if stage is Stage.HEADER and replies == packet("s"):
        with pytest.raises(LocalProtocolError, match="not legal at header"):
            session.decide(stage, replies)
        replies = packet("c")
    session.decide(stage, replies)


def final_state(dialogue: list[Recorded]) -> State:
    """Where a conversation stands that the MTA left, with or without saying so."""
    last = [p.letter for p in dialogue if p.from_mta][-1]
    return {"Q": State.CLOSED, "T": State.DATA}.get(last, State.CONNECTED)
