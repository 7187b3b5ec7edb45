"""Workers with several messages in hand: each message has its own answer, of whatever size."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sharded_milter.protocol import replies
from sharded_milter.testing.mta import Mail

from .server import Server

pytestmark = pytest.mark.integration

ECHO = """
from sharded_milter import Accept, Milter, ReplaceBody

milter = Milter("echo")

@milter.eom
def scan(message):
    return Accept(ReplaceBody(message.body))
"""

#: In an AMP box, just in one, in memory of its own: several of the second fill a socket.
SIZES = (100, 47_000, 60_000)
CONNECTIONS = 16
MAILS = 60  # on each connection; after some the workers are known to be quick


def bodies(server: Server, connection: int) -> list[tuple[bytes, bytes]]:
    """What was sent and what the answer has made of it."""
    found = []
    with server.client() as client:
        for number in range(MAILS):
            line = b"%d of %d\r\n" % (number, connection)
            size = SIZES[(number + connection) % len(SIZES)]
            body = (line * (size // len(line) + 1))[:size]
            outcome = client.deliver(Mail(b"Subject: echo\r\n\r\n" + body))
            chunks = [a.chunk for a in outcome.actions if isinstance(a, replies.ReplaceBody)]
            found.append((body, b"".join(chunks)))
    return found


def test_every_message_has_its_own_answer_and_no_worker_dies(tmp_path: Path) -> None:
    with Server(tmp_path, source=ECHO) as server:
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            results = threads.map(lambda number: bodies(server, number), range(CONNECTIONS))
            answered = [pair for result in results for pair in result]
        assert len(answered) == CONNECTIONS * MAILS
        assert [sent[:30] for sent, got in answered if sent != got] == []
        assert server.counters().get("workers_lost", 0) == 0
        assert server.unforeseen() == [], server.log()
