"""The master's reactor, in a process of its own: events, failing handlers, timed calls."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, sys
from sharded_milter.reactor import install
install()
from twisted.internet import reactor, task
from twisted.logger import globalLogBeginner, formatEvent
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.endpoints import UNIXClientEndpoint, UNIXServerEndpoint, connectProtocol

globalLogBeginner.beginLoggingTo(
    [lambda event: "failure" in event and print(event["failure"].getErrorMessage())],
    redirectStandardIO=False,
)

class Serving(Protocol):
    def dataReceived(self, data):
        print("received", data.decode())
        if data == b"fail":
            raise ValueError("a defect")
        self.transport.write(b"answer")

class Asking(Protocol):
    def dataReceived(self, data):
        print("answered", data.decode())
        self.transport.write(b"fail")

    def connectionLost(self, reason):
        print("lost")
        reactor.callLater(0, reactor.stop)

def ask(_):
    connectProtocol(UNIXClientEndpoint(reactor, sys.argv[1]), Asking()).addCallback(
        lambda asking: asking.transport.write(b"question")
    )

UNIXServerEndpoint(reactor, sys.argv[1]).listen(Factory.forProtocol(Serving)).addCallback(ask)
reactor.run()
print(type(reactor).__name__)
"""


def test_it_handles_events_and_logs_what_a_handler_raises(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{tmp_path}/s"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "received question",
        "answered answer",
        "received fail",
        "a defect",
        "lost",
        "MasterReactor",
    ]
