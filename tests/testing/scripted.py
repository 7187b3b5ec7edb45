"""A milter in a thread that checks the load client's commands and sends scripted replies."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

from sharded_milter.errors import MilterError
from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import VERSION, Manifest, negotiate
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import Accept, AddHeader, Continue
from sharded_milter.protocol.session import Session
from sharded_milter.protocol.stages import STAGES, Actions, Protocol
from sharded_milter.protocol.wire import LETTER, PAYLOAD, Framer

VERDICT = AddHeader("X-Bench", "1").encode() + Accept().encode()


class Scripted:
    """Serves on a path; `errors` has what the client did wrong."""

    def __init__(
        self,
        path: str,
        protocol: Protocol,
        verdict: Sequence[bytes] = (VERDICT,),
        early: Mapping[str, Sequence[Packet]] = MappingProxyType({}),
        silent_after: int | None = None,  # so many verdicts
    ) -> None:
        self.path = path
        self.letters: list[str] = []  # of all packets, in order
        self.errors: list[BaseException] = []
        self.hang_up = False  # instead of a verdict
        self._protocol = protocol
        self._verdict = verdict
        self._silent_after = silent_after
        #: By the command's letter, what each of them hears in turn.
        self._early = {letter: itertools.cycle(replies) for letter, replies in early.items()}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def stop(self) -> None:
        """Raise the errors of the thread."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        for error in self.errors:
            raise error

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):  # a client that gives up closes
            try:
                self._talk(sock)
            except (AssertionError, MilterError) as error:
                self.errors.append(error)

    def _talk(self, sock: socket.socket) -> None:
        session, framer = Session(), Framer()
        while data := sock.recv(65_536):
            for packet in framer.receive(data):
                self.letters.append(chr(packet[LETTER]))
                step = session.receive(packet)
                if packet[LETTER : LETTER + 1] == commands.Negotiate.letter:
                    self._negotiate(sock, session, packet)
                elif self.hang_up and packet[LETTER : LETTER + 1] == commands.Eom.letter:
                    return
                elif step.stage is not None:
                    self._answer(sock, packet)

    def _negotiate(self, sock: socket.socket, session: Session, packet: bytes) -> None:
        manifest = Manifest("scripted", Actions.ADDHDRS, self._protocol)
        agreement = negotiate(commands.Negotiate.offer(packet[PAYLOAD:]), [manifest])
        session.agree(agreement)
        sock.sendall(commands.Negotiate(VERSION, Actions.ADDHDRS, self._protocol).encode())

    def _answer(self, sock: socket.socket, packet: bytes) -> None:
        stage = STAGES[packet[LETTER]]
        if self._protocol & stage.suppress:
            raise AssertionError(f"{stage.name} was not to be sent")
        if packet[LETTER : LETTER + 1] == commands.Eom.letter:
            if self._silent_after is not None and self.letters.count("E") > self._silent_after:
                return
            for piece in self._verdict:
                sock.sendall(piece)
        elif not self._protocol & stage.no_reply:
            early = self._early.get(chr(packet[LETTER]), iter(()))
            sock.sendall(next(early, Continue()).encode())
