"""One session on a raw socket, told as the packets of both sides; knows nothing of our codec."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from ..milter_client import OFFER, packet

#: An answer that does not come is part of what a script does wrong.
ANSWER_TIMEOUT = 20.0

#: The letter of a command with its bits for "do not send" and "no reply".
BITS = {
    b"C": (0x1, 0x1000),
    b"H": (0x2, 0x2000),
    b"M": (0x4, 0x4000),
    b"R": (0x8, 0x8000),
    b"T": (0x200, 0x10000),
    b"U": (0x100, 0x20000),
    b"L": (0x20, 0x80),
    b"N": (0x40, 0x40000),
    b"B": (0x10, 0x80000),
    b"E": (0, 0),
}

#: The name of the client; a script may do something else for every client.
CLIENT = b"client.example.test"

#: A whole session: each macro packet and each command, in order.
SESSION = [
    (b"D", b"Cj\0mx.example.test\0v\0Postfix 3.7.11\0"),
    (b"C", CLIENT + b"\x004" + struct.pack("!H", 2525) + b"192.0.2.1\0"),
    (b"D", b"H"),
    (b"H", b"client.example.test\0"),
    (b"D", b"M{mail_addr}\0sender@example.org\0{8bit}\0caf\xe9\0"),
    (b"M", b"<sender@example.org>\0SIZE=100\0BODY=8BITMIME\0"),
    (b"D", b"Ri\0QUEUEID\0{rcpt_addr}\0recipient@example.com\0"),
    (b"R", b"<recipient@example.com>\0NOTIFY=NEVER\0"),
    (b"U", b"FROB nicate\0"),
    (b"T", b""),
    (b"L", b"Subject\0hello\0"),
    (b"L", b"X-Other\0 caf\xe9\n folded\0"),
    (b"N", b""),
    (b"B", b"body \xff\0 line\r\n"),
    (b"D", b"Ei\0QUEUEID\0"),
    (b"E", b""),
    (b"M", b"<second@example.org>\0"),
]

_FINAL = b"acrtdysf4O"

#: Instead of an answer: there was none.
NOTHING = (b"", b"nothing came")


def of_client(name: bytes, letter: bytes, payload: bytes) -> bytes:
    """The payload of a command of `SESSION` when the client has that name."""
    return name + payload[payload.index(b"\0") :] if letter == b"C" else payload


class Session:
    """A connection of an MTA that takes whatever comes; use it in a `with`."""

    def __init__(self, listen: str, offer: bytes = OFFER, timeout: float = ANSWER_TIMEOUT) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._socket.connect(str(Path(listen.partition(":")[2])))
        self.negotiated = self.ask(b"O", offer)
        [(_, payload)] = [answer for answer in self.negotiated if answer[0] == b"O"]
        self._protocol = struct.unpack("!I", payload[8:12])[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def ask(self, letter: bytes, payload: bytes = b"") -> list[tuple[bytes, bytes]]:
        """Everything up to the final answer; nothing where none is due."""
        no, no_reply = BITS.get(letter, (0, 0))
        if letter in BITS and self._protocol & no:
            return []
        self._socket.sendall(packet(letter, payload))
        if letter in b"DAQ" or (letter in BITS and self._protocol & no_reply):
            return []
        return list(self._answers())

    def play(self, client: bytes = CLIENT) -> list[tuple[bytes, list[tuple[bytes, bytes]]]]:
        """`SESSION`, an abort and the end: each command with its answers."""
        session = [(letter, of_client(client, letter, payload)) for letter, payload in SESSION]
        story = [(letter, self.ask(letter, payload)) for letter, payload in session]
        self._leave()
        return [(letter, answers) for letter, answers in story if letter != b"D"]

    def converse(self, client: bytes) -> list[tuple[bytes, list[tuple[bytes, bytes]]]]:
        """`SESSION` of a client of that name, as an MTA has it: a verdict has its consequences.

        The story ends with NOTHING where an answer that is due does not come.
        """
        story: list[tuple[bytes, list[tuple[bytes, bytes]]]] = []
        decided = False
        for letter, payload in SESSION:
            if letter == b"M":
                decided = False
            if decided:
                continue
            try:
                answers = self.ask(letter, of_client(client, letter, payload))
            except TimeoutError:
                return [*story, (letter, [NOTHING])]
            if letter != b"D":
                story.append((letter, answers))
            verdict = answers[-1][0] if answers else b"c"
            if verdict not in b"cs":
                if letter in b"CH":
                    break
                decided = letter in b"MTLNBE" or (letter == b"R" and verdict in b"ad")
        self._leave()
        return story

    def _leave(self) -> None:
        self.ask(b"A")
        self.ask(b"Q")
        while self._socket.recv(4096):  # until close() has run
            pass

    def _answers(self) -> Iterator[tuple[bytes, bytes]]:
        letter = b""
        while letter not in [bytes([final]) for final in _FINAL]:
            size = struct.unpack("!I", self._read(4))[0]
            body = self._read(size)
            letter = body[:1]
            yield letter, body[1:]

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self._socket.recv(count - len(data))
            if not chunk:
                raise ConnectionError(f"closed after {data!r}")
            data += chunk
        return data
