"""The MTA's side packet by packet, for MTAs that stop in the middle of something."""

import socket
from collections.abc import Iterable

from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, VERSION
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import LEGAL, parse_reply
from sharded_milter.protocol.wire import LETTER, Framer
from sharded_milter.testing.mta import Mail

from .flow import mail, subject
from .server import Server, until

GREETING: list[Packet] = [
    commands.Connect("client.example.test", "4", 25, "192.0.2.1"),
    commands.Helo("client.example.test"),
]


def opened(server: Server) -> socket.socket:
    """A connection that has negotiated with a milter which answers nothing but the end."""
    return negotiated(server.socket())


def negotiated(sock: socket.socket) -> socket.socket:
    """The same on a connection that is there."""
    sock.sendall(commands.Negotiate(VERSION, KNOWN_ACTIONS, KNOWN_PROTOCOL).encode())
    assert read(sock)[LETTER] == commands.Negotiate.letter[0]
    say(sock, GREETING)
    return sock


def beginning(message: Mail) -> list[Packet]:
    """All of a message but its body and its end."""
    return [
        commands.Macro("M", (("i", message.queue_id),)),
        commands.Mail(f"<{message.sender}>"),
        commands.Rcpt(f"<{message.recipients[0]}>"),
        commands.Header("Subject", f" {subject(message)}"),
    ]


def end(message: Mail) -> list[Packet]:
    body = message.raw.partition(b"\r\n\r\n")[2]
    chunks = [body[at : at + 65_000] for at in range(0, len(body), 65_000)]
    return [*map(commands.Body, chunks), commands.Eom()]


def say(sock: socket.socket, packets: Iterable[Packet]) -> None:
    sock.sendall(b"".join(packet.encode() for packet in packets))


def read(sock: socket.socket) -> bytes:
    """The next packet; empty when the other side has closed."""
    framer, packets = Framer(), list[bytes]()
    while not packets:
        data = sock.recv(1)
        if not data:
            return b""
        packets = framer.receive(data)
    return packets[0]


def verdict(sock: socket.socket) -> Packet | None:
    """The final reply; None when the connection ends without one."""
    while packet := read(sock):
        if LEGAL[packet[LETTER]].final:
            return parse_reply(packet)
    return None


def scanned(server: Server, order: str) -> socket.socket:
    """A connection whose message is being scanned."""
    message = mail(order)
    sock = opened(server)
    say(sock, [*beginning(message), *end(message)])
    until(lambda: server.scans(subject(message)) == 1, "the scan runs")
    return sock
