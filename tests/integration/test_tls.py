"""MTAs that speak TLS to a program of one's own: everything is encrypted."""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

PROGRAM = """
import sys
from twisted.internet import reactor, ssl
from sharded_milter import Accept, Message, Milter, Reject, ReplaceBody
from sharded_milter.embedded import MilterProtocolFactory

milter = Milter("tls")

@milter.helo
def helo(connection):
    return Reject("no") if connection.helo == "refused" else None

@milter.eom
def eom(message: Message):
    return Accept(ReplaceBody(b"y" * 300_000))

context = ssl.DefaultOpenSSLContextFactory(sys.argv[1], sys.argv[2])
port = reactor.listenSSL(0, MilterProtocolFactory([milter]), context, interface="127.0.0.1")
print(port.getHost().port, flush=True)
reactor.run()
"""


def packet(letter: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">I", 1 + len(payload)) + letter + payload


OFFER = packet(b"O", struct.pack(">III", 6, 0x1FF, 0x1FFFFF))
CONNECT = packet(b"C", b"client\x004\0\x19192.0.2.1\0")


def received(sock: ssl.SSLSocket) -> tuple[bytes, int]:
    """The letter of the next packet, and the bytes of its payload."""
    head = b""
    while len(head) < 5:
        data = sock.recv(5 - len(head))
        assert data, "the connection has ended"
        head += data
    length = int.from_bytes(head[:4], "big") - 1
    rest = length
    while rest:
        rest -= len(sock.recv(rest))
    return head[4:], length


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    program = folder / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(program), str(key), str(certificate)],
        stdout=subprocess.PIPE,
        cwd=Path(folder),
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def connected(port: int) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=30))


def test_answers_are_encrypted_as_the_commands_are(port: int) -> None:
    with connected(port) as mta:
        mta.sendall(OFFER)
        assert received(mta)[0] == b"O"
        mta.sendall(CONNECT + packet(b"H", b"refused\0"))
        assert received(mta)[0] == b"y"
        mta.sendall(packet(b"Q"))
        assert mta.recv(1) == b""


def test_an_answer_that_is_larger_than_the_sockets_buffers_arrives_whole(port: int) -> None:
    with connected(port) as mta:
        mta.sendall(OFFER)
        assert received(mta)[0] == b"O"
        mail = [CONNECT, packet(b"H", b"client\0"), packet(b"M", b"<a@b>\0")]
        mail += [packet(b"R", b"<c@d>\0"), packet(b"L", b"Subject\0 x\0"), packet(b"N")]
        mta.sendall(b"".join([*mail, packet(b"B", b"x" * 1000), packet(b"E")]))
        answers = [received(mta)]
        while answers[-1][0] != b"a":
            answers.append(received(mta))
        assert sum(length for letter, length in answers if letter == b"b") == 300_000
