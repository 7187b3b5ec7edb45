"""What real MTAs once said is said again to the real daemon, by the rules that it negotiates."""

import json
import socket
import struct
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from .daemon import Daemon
from .mails import write_milter

pytestmark = pytest.mark.integration

CAPTURES = Path(__file__).parents[1] / "captures"
INDEX: dict[str, dict[str, Any]] = json.loads((CAPTURES / "packets.json").read_text())

#: Longer than any answer of a milter that has nothing to say takes, on a loaded machine.
TIMEOUT = 30.0

#: This MTA was told to send nothing but the end of the message; our milter wants to see more.
ALL_SUPPRESSED = "pf14-all-NO"

NAMES = sorted(INDEX.keys() - {ALL_SUPPRESSED})

#: The bits (SMFIP_*) against a command and against its answer.
NO = {
    "C": 0x1, "H": 0x2, "M": 0x4, "R": 0x8, "T": 0x200, "L": 0x20, "N": 0x40, "B": 0x10, "U": 0x100
}  # fmt: skip
NO_REPLY = {
    "C": 0x1000, "H": 0x2000, "M": 0x4000, "R": 0x8000, "T": 0x10000, "L": 0x80, "N": 0x40000,
    "B": 0x80000, "U": 0x20000,
}  # fmt: skip
CONTINUE = (b"c", b"")

EVERY_STAGE = """
    from sharded_milter import Milter

    milter = Milter("nothing to say")

    @milter.connect
    def connect(connection): return None

    @milter.helo
    def helo(connection): return None

    @milter.mail
    def mail(envelope): return None

    @milter.rcpt
    def rcpt(recipient, envelope): return None

    @milter.data
    def data(envelope): return None

    @milter.eoh
    def eoh(envelope, headers): return None

    @milter.eom
    def eom(message): return None

    @milter.unknown
    def unknown(command, connection): return None
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a daemon whose milter is asked at every stage and goes on."""
    folder = tmp_path_factory.mktemp("replay")
    write_milter(folder, "every_stage.py", EVERY_STAGE)
    path = folder / "socket"
    with Daemon(
        "./every_stage.py:milter", "--workers", "1", "--listen", f"unix:{path}", cwd=folder
    ):
        yield path


class Replay:
    """The MTA's side of a conversation, by our own reading of the protocol."""

    def __init__(self, path: Path) -> None:
        self.protocol = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rb")

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def negotiate(self, offer: bytes) -> None:
        self.send(offer)
        letter, payload = self.read()
        assert letter == b"O"
        self.protocol = struct.unpack("!I", payload[8:12])[0]

    def is_sent(self, letter: str) -> bool:
        return not self.protocol & NO.get(letter, 0)

    def is_answered(self, letter: str) -> bool:
        return letter not in "DAQK" and not self.protocol & NO_REPLY.get(letter, 0)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self) -> tuple[bytes, bytes]:
        length = struct.unpack("!I", self._stream.read(4))[0]
        body = self._stream.read(length)
        return body[:1], body[1:]

    def rest(self) -> bytes:
        """Whatever else is said until the other side closes; we say nothing more."""
        self._socket.shutdown(socket.SHUT_WR)
        return self._stream.read()


def commands(name: str) -> Iterator[tuple[str, bytes]]:
    """The packets of the MTA by the list that the recorder wrote: letter and whole packet."""
    stream = (CAPTURES / f"{name}.c2f.bin").read_bytes()
    for entry in INDEX[name]["packets"]:
        direction, offset, letter, size = entry.split()
        if direction == ">":
            start = int(offset)
            yield letter, stream[start : start + 5 + int(size)]


@pytest.fixture
def replay(server: Path) -> Iterator[Replay]:
    connection = Replay(server)
    yield connection
    connection.close()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_capture_gets_exactly_one_verdict(replay: Replay, name: str) -> None:
    (_, offer), *others = commands(name)
    replay.negotiate(offer)
    for letter, packet in others:
        if replay.is_sent(letter):
            replay.send(packet)
            if replay.is_answered(letter):
                assert replay.read() == CONTINUE, letter
    assert replay.rest() == b""


@pytest.mark.parametrize("name", NAMES)
def test_a_capture_in_one_piece_gets_the_same_verdicts(replay: Replay, name: str) -> None:
    """Nothing is lost or doubled where an MTA writes several packets at once.

    Up to where it takes something back: that would withdraw what still waits.
    """
    (_, offer), *others = commands(name)
    replay.negotiate(offer)
    spoken = takewhile(lambda command: command[0] not in "AQK", others)
    sent = [(letter, packet) for letter, packet in spoken if replay.is_sent(letter)]
    replay.send(b"".join(packet for _, packet in sent))
    verdicts = [replay.read() for letter, _ in sent if replay.is_answered(letter)]
    assert set(verdicts) == {CONTINUE}
    assert replay.rest() == b""


def test_an_mta_that_leaves_out_what_we_asked_for_is_not_followed(replay: Replay) -> None:
    """An end of message without a message is not the protocol that was agreed on."""
    (_, offer), *others = commands(ALL_SUPPRESSED)
    replay.negotiate(offer)
    replay.send(b"".join(packet for _, packet in others))
    assert replay.rest() == b""
