"""The MTA's side of the wire on a raw socket, in a few lines that know nothing of our codec."""

import socket
import struct
from pathlib import Path
from typing import Self

#: Version 6, all actions (SMFIF_*), and all protocol flags (SMFIP_*) but HDR_LEADSPC.
OFFER = struct.pack("!III", 6, 0x1FF, 0xFFFFF)
TIMEOUT = 30.0


def packet(letter: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("!I", len(letter + payload)) + letter + payload


class MilterClient:
    """One connection to a milter on a UNIX socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(str(path))
        self.protocol = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> tuple[bytes, bytes]:
        """The next packet, as letter and payload."""
        body = self._read_exactly(struct.unpack("!I", self._read_exactly(4))[0])
        return body[:1], body[1:]

    def ask(self, letter: bytes, payload: bytes = b"") -> tuple[bytes, bytes]:
        self.send(packet(letter, payload))
        return self.read()

    def is_closed(self) -> bool:
        """True when the other side ends the connection, whatever it has said before.

        TimeoutError when it does neither for `TIMEOUT`.
        """
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionError:
            pass
        return True

    def is_open(self) -> bool:
        """True when neither data nor an end is there to be read now."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(TIMEOUT)
        return False

    def negotiate(self) -> None:
        letter, payload = self.ask(b"O", OFFER)
        assert letter == b"O", (letter, payload)
        self.protocol = struct.unpack("!I", payload[8:12])[0]

    def message(self, subject: bytes) -> list[tuple[bytes, bytes]]:
        """One whole mail after `negotiate`; returns every packet that answers its end."""
        self._command(
            b"C",
            b"client.example.test\x004" + struct.pack("!H", 2525) + b"127.0.0.1\0",
            no=0x1,
            nr=0x1000,
        )
        self._command(b"H", b"client.example.test\0", no=0x2, nr=0x2000)
        self._command(b"M", b"<sender@example.org>\0", no=0x4, nr=0x4000)
        self._command(b"R", b"<recipient@example.com>\0", no=0x8, nr=0x8000)
        self._command(b"T", b"", no=0x200, nr=0x10000)
        self._command(b"L", b"Subject\0" + subject + b"\0", no=0x20, nr=0x80)
        self._command(b"N", b"", no=0x40, nr=0x40000)
        self._command(b"B", b"body\r\n", no=0x10, nr=0x80000)
        answers = [self.ask(b"E")]
        while answers[-1][0] in b"hib+-mq2ep":
            answers.append(self.read())
        return [answer for answer in answers if answer[0] != b"p"]

    def assert_served(self, subject: bytes) -> None:
        """One whole mail, which the milter of these tests has to mark with its subject."""
        change, verdict = self.message(subject)
        assert change[0] in b"hi", change
        assert change[1].endswith(b"X-Seen\0" + subject + b"\0"), change
        assert verdict in [(b"a", b""), (b"c", b"")], verdict

    def _command(self, letter: bytes, payload: bytes, *, no: int, nr: int) -> None:
        if self.protocol & no:
            return
        self.send(packet(letter, payload))
        if not self.protocol & nr:
            answer = self.read()
            assert answer == (b"c", b""), (letter, answer)

    def _read_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self.socket.recv(count - len(data))
            assert chunk, f"the milter closed the connection after {data!r}"
            data += chunk
        return data
