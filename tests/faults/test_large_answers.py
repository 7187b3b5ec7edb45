"""A worker that dies while the master reads a large answer of its: who is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from .flow import Background, mail
from .server import Server, until

pytestmark = pytest.mark.integration

#: Short scans at first, so that the worker is given jobs ahead.
SOURCE = """
    import os, time
    from sharded_milter import Accept, Milter, ReplaceBody
    milter = Milter("large")
    body = b"x" * 20_000_000

    @milter.eom
    def eom(message):
        what = message.headers["Subject"].split()[0]
        if what == "big":
            time.sleep(0.15)
            return Accept(ReplaceBody(body))
        if what == "crash":
            os.kill(os.getpid(), 9)
"""


def test_the_message_that_has_killed_is_to_blame_and_not_the_large_answer_before_it(
    tmp_path: Path,
) -> None:
    with Server(tmp_path, "--retries", "0", source=SOURCE, workers=1) as server:
        with server.client() as client:
            for _ in range(60):
                client.deliver(mail("ordinary"))
            large = Background(server, mail("big"))
            deadly = Background(server, mail("crash"))
            until(lambda: large.done and deadly.done, "both have their verdict")
        assert (large.word(), deadly.word()) == ("accept", "tempfail")
        assert server.counters()["workers_lost"] == 1
        assert server.unforeseen() == [], server.log()
