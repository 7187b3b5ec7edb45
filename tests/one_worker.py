"""A real worker process; only the master is the test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock

from sharded_milter.ipc.channel import MasterChannel
from sharded_milter.ipc.messages import Answer
from sharded_milter.protocol import replies
from sharded_milter.protocol.stages import Stage

MILTER = """
import os, resource, signal, sys
from sharded_milter import Milter, Reject

milter = Milter("real")

@milter.connect
def connect(connection):
    if os.environ.get("SAY"):
        print("to stdout")
    return Reject(str(eval(os.environ.get("EXPRESSION", "1"))))
"""
PATIENCE = 60.0


class Master(MasterChannel):
    """The master's end over a blocking socket; it keeps what the worker says."""

    def __init__(self, sock: socket.socket) -> None:
        self.clock = Clock()
        super().__init__(self, self.clock)
        self.sock = sock
        self.told: list[str] = []
        self.answers: list[Answer] = []
        self.code = b""
        self.makeConnection(self)  # type: ignore[no-untyped-call]

    disconnecting = False
    dataBuffer = b""
    offset = _tempDataLen = 0

    def write(self, data: bytes) -> None:
        self.sock.sendall(data)

    def getPeer(self) -> str:
        return "worker"

    getHost = getPeer

    def ready(self, milters: list[dict[str, bytes]], code: bytes, socket: bytes) -> None:
        self.told += [milter["name"].decode() for milter in milters]
        self.code = code

    def load_failed(self, reason: bytes, details: bytes) -> None:
        self.told.append(reason.decode())

    def sandboxed(self, text: bytes, incomplete: bytes) -> None:
        self.told.append(text.decode())

    def answered(self, number: int, answer: Answer) -> None:
        self.answers.append(answer)

    def ponged(self) -> None:
        self.told.append("pong")

    def broke_rule(self, why: str) -> None:
        raise AssertionError(why)

    def channel_closed(self) -> None: ...

    def until(self, ended: list[Any]) -> Any:
        """Reads until there is something in the list."""
        while not ended:
            data = self.sock.recv(65_536)
            assert data, "the worker has closed its socket"
            self.dataReceived(data)
        return ended[-1]

    def evaluated(self) -> str:
        self.put(1)
        return self.answer()

    def put(self, number: int) -> None:
        self.ask(number, (Stage.CONNECT.value, 0, 0, 0), b"", b"")

    def answer(self) -> str:
        """The next."""
        self.until(self.answers)
        answer = self.answers.pop(0)
        assert answer == Answer(answer.replies)
        reply: Any = replies.parse_reply(answer.replies)
        return str(reply.text.removeprefix("550 5.7.1 "))


class Worker:
    """A worker process with a milter, and the master's end of its socket."""

    def __init__(
        self, folder: Path, master: str = "os.getppid()", source: str = MILTER, **options: Any
    ) -> None:
        (folder / "real_milter.py").write_text(source)
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        env |= options.pop("env", {})
        spec = options.pop("spec", "real_milter:milter")
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        with theirs:
            fd = theirs.fileno()
            script = (
                f"import os; os.dup2({fd}, 3); {fd} == 3 or os.close({fd});"
                "from sharded_milter.workers.bootstrap import main;"
                f"main({master}, {[spec]!r}, **{options!r})"
            )
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", script],
                cwd=folder,
                env=env,
                pass_fds=(fd,),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        self.sock = ours
        self.master = Master(ours)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def ready(self) -> Worker:
        assert self.master.until(self.master.told) == "real"
        return self

    def wait(self) -> int:
        return self.process.wait(PATIENCE)
