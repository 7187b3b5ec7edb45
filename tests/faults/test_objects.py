"""Milters that are objects, when their shards die, hang, are replaced, or answer out of turn."""

from __future__ import annotations

import os
import re
import signal
import textwrap
import threading
from pathlib import Path

import pytest

from sharded_milter.protocol import commands, replies
from sharded_milter.testing.dialogue import content, envelope
from sharded_milter.testing.mta import Mail, MtaClient, Outcome

from .flow import mail, word
from .server import Server, until

pytestmark = pytest.mark.integration

OBJECT = """
    import asyncio
    import os
    import random
    import time

    from sharded_milter.embedded import Milter

    class Remembers(Milter):
        replayable = {replayable}

        def __init__(self, factory, protocol):
            super().__init__(factory, protocol)
            self.seen = []

        async def xxfi_connect(self, hostname, family, address):
            await asyncio.sleep({sleep} * random.random())
            self.seen.append("connect")
            return self.ReturnCodes.CONTINUE

        async def xxfi_envfrom(self, argv):
            await asyncio.sleep({sleep} * random.random())
            self.seen.append("from " + argv[0])
            return self.ReturnCodes.CONTINUE

        async def xxfi_envrcpt(self, argv):
            await asyncio.sleep({sleep} * random.random())
            self.seen.append("rcpt " + argv[0])
            return self.ReturnCodes.CONTINUE

        async def xxfi_header(self, name, value):
            await asyncio.sleep({sleep} * random.random())
            self.seen.append("header")
            return self.ReturnCodes.CONTINUE

        async def xxfi_eom(self):
            await asyncio.sleep({sleep} * random.random())
            self.smfi_addheader("X-Seen", ", ".join(self.seen))
            self.smfi_addheader("X-Pid", str(os.getpid()))
            self.seen = self.seen[:1]
            return self.ReturnCodes.ACCEPT

        def xxfi_abort(self):
            self.seen = self.seen[:1]
            print("abort", flush=True)

        def xxfi_close(self):
            print("close", flush=True)
"""


def source(*, replayable: bool = False, sleep: float = 0.0) -> str:
    text = textwrap.dedent(OBJECT.format(replayable=replayable, sleep=sleep))
    return text + "\n\nmilter = Remembers\n"


def told(outcome: Outcome) -> dict[str, str]:
    return {a.name: a.value.strip() for a in outcome.actions if isinstance(a, replies.AddHeader)}


def of(mail: Mail) -> str:
    recipients = ", ".join(f"rcpt <{recipient}>" for recipient in mail.recipients)
    return f"connect, from <{mail.sender}>, {recipients}, header"


class Half(MtaClient):
    """Sends a mail's envelope, and its content later."""

    def begin(self, message: Mail) -> None:
        self.message, self.outcome = message, Outcome()
        self._send_all(envelope(message), self.outcome)
        assert not self.outcome.ended

    def finish(self) -> Outcome:
        self._send_all(content(self.message), self.outcome)
        self._send(commands.Abort())
        return self.outcome


@pytest.mark.parametrize("killed", ["between messages", "within a message"])
@pytest.mark.parametrize("replayable", [True, False])
def test_a_killed_shard_costs_its_objects_one_message_or_none(
    tmp_path: Path, killed: str, replayable: bool
) -> None:
    with Server(tmp_path, source=source(replayable=replayable)) as server:
        client = Half.to_path(str(server.path))
        with client:
            first = client.deliver(mail())
            victim = int(told(first)["X-Pid"])
            if killed == "within a message":
                client.begin(mail())
            os.kill(victim, signal.SIGKILL)
            until(lambda: victim not in server.workers(), "the worker is gone")
            server.wait_log("is gone: killed by SIGKILL")
            outcomes = [client.finish()] if killed == "within a message" else []
            outcomes += [client.deliver(mail()) for _ in range(3)]
        verdicts = [word(outcome) for outcome in outcomes]
        lost = ["tempfail"] * (killed == "within a message" and not replayable)
        assert verdicts == [*lost, *["accept"] * (len(verdicts) - len(lost))]
        for outcome in outcomes[len(lost) :]:
            assert told(outcome)["X-Seen"] == of(mail())
            assert int(told(outcome)["X-Pid"]) != victim
        assert server.unforeseen() == [], server.log()


def test_a_hundred_slow_coroutines_at_a_time_keep_their_order(tmp_path: Path) -> None:
    failures: list[str] = []

    def talk(path: str, connections: range) -> None:
        for number in connections:
            with MtaClient.to_path(path) as client:
                for turn in range(2):
                    sent = Mail(
                        b"Subject: %d\r\n\r\n.\r\n" % number, f"{number}-{turn}@x",
                        tuple(f"{number}-{turn}-{n}@y" for n in range(2)), f"Q{number}.{turn}",
                    )  # fmt: skip
                    seen = told(client.deliver(sent)).get("X-Seen")
                    if seen != of(sent):
                        failures.append(f"{sent}: {seen}")

    (tmp_path / "slow.py").write_text(source(sleep=0.01))
    with Server(tmp_path, "--in-master", "./slow.py:Remembers") as server:
        path = str(server.path)
        ranges = [range(start, 300, 100) for start in range(100)]
        threads = [threading.Thread(target=talk, args=(path, numbers)) for numbers in ranges]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert server.unforeseen() == [], server.log()


def test_connections_stay_on_the_old_generation_until_they_end(tmp_path: Path) -> None:
    with Server(tmp_path, source=source()) as server:
        old = set(server.workers())
        with MtaClient.to_path(str(server.path)) as client:
            assert int(told(client.deliver(mail()))["X-Pid"]) in old
            os.kill(server.pid, signal.SIGHUP)
            server.wait_log("reloaded: 2 new workers serve")
            for _ in range(2):
                assert int(told(client.deliver(mail()))["X-Pid"]) in old
            with MtaClient.to_path(str(server.path)) as later:
                assert int(told(later.deliver(mail()))["X-Pid"]) not in old
            assert old & set(server.workers())
        until(lambda: not old & set(server.workers()), "the old workers have ended")
        assert server.unforeseen() == [], server.log()


def test_a_connection_that_lasts_longer_than_the_grace_gets_a_new_object(tmp_path: Path) -> None:
    with Server(tmp_path, "--graceful-timeout", "1", source=source()) as server:
        old = set(server.workers())
        with MtaClient.to_path(str(server.path)) as client:
            client.deliver(mail())
            os.kill(server.pid, signal.SIGHUP)
            server.wait_log("reloaded: 2 new workers serve")
            until(lambda: not old & set(server.workers()), "the old workers have ended")
            seen = told(client.deliver(mail()))
        assert seen["X-Seen"] == of(mail())
        assert int(seen["X-Pid"]) not in old


def test_objects_are_spread_over_the_workers_and_end_with_their_connections(tmp_path: Path) -> None:
    with Server(tmp_path, workers=3, source=source()) as server:
        clients = [MtaClient.to_path(str(server.path)) for _ in range(9)]
        pids = [told(client.deliver(mail()))["X-Pid"] for client in clients]
        assert sorted(pids.count(pid) for pid in set(pids)) == [3, 3, 3]
        for client in clients:
            client.close()
        until(lambda: len(re.findall(r"\] close$", server.log(), re.M)) == 9, "all have ended")
        assert "] abort" not in server.log()
