"""Generated runs against two real workers, in a program of its own; prints what became of them.

`python -m tests.model.real RUNS SEED FILE`: the workers note in FILE which message they scan.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from twisted.internet import reactor as real_reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from sharded_milter.dispatch.dispatcher import Dispatcher
from sharded_milter.dispatch.job import Blame, Job, Loss
from sharded_milter.errors import JobFailed
from sharded_milter.limits import Limits
from sharded_milter.pool.pool import Pool
from sharded_milter.pool.shard import Shard, ShardState
from sharded_milter.pool.spawned import Spawned, WorkerConfig, worker_environment
from sharded_milter.protocol import commands
from sharded_milter.protocol.stages import Protocol, Stage

reactor: Any = real_reactor
WORKERS = 2
RETRIES = 1

CONNECTION = b"".join(
    packet.encode()
    for packet in (
        commands.Negotiate(6, 0x1FF, Protocol(0)),
        commands.Connect("client.example", "4", 25, "192.0.2.1"),
        commands.Helo("client"),
    )
)
BEFORE_BODY = b"".join(
    packet.encode()
    for packet in (
        commands.Mail("<a@example.org>"),
        commands.Rcpt("<b@example.net>"),
        commands.Data(),
        commands.Header("Subject", "orders"),
        commands.Eoh(),
    )
)


def message(number: int, sleep: int, then: str) -> bytes:
    """A transcript whose body gives the orders."""
    body = b"number=%d sleep=%d then=%s\r\n" % (number, sleep, then.encode())
    return BEFORE_BODY + commands.Body(body).encode() + commands.Eom().encode()


class Runs:
    """All runs, on one pool."""

    def __init__(self, seed: int, scans: str) -> None:
        self._random = random.Random(seed)
        self._numbers = 0
        self.wrong: list[str] = []
        self.ends: Counter[str] = Counter()
        self.kills = 0
        limits = Limits(retries=RETRIES)
        self.dispatcher = Dispatcher(limits, reactor)
        here = str(Path(__file__).parent)
        env = worker_environment(os.environ, {"MODEL_SCANS": scans})
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (here, env.get("PYTHONPATH"))))
        workplace = WorkerConfig(("told:milter",), env)

        def make_shard(slot: int, pool: Pool) -> Shard:
            place = Spawned(workplace, slot, reactor)
            return Shard(slot, place, self.dispatcher, pool, reactor)

        self.pool = Pool(make_shard, WORKERS, limits, self.dispatcher, reactor)

    async def all(self, runs: int) -> None:
        """Starts, runs, stops."""
        await self.pool.start()
        for _ in range(runs):
            await self._run()
        await self.pool.stop()

    async def _run(self) -> None:
        choose = self._random
        awaited = []
        for _ in range(choose.randint(2, 8)):
            then = choose.choices(["answers", "raises", "exits"], [100, 6, 0.4])[0]
            sleep = choose.choice([0, 0, 1, 2, 5, 20, 80 if choose.random() < 0.1 else 0])
            job, ended = self._submit(sleep, then)
            if choose.random() < 0.08:
                reactor.callLater(choose.random() / 50, self._cancel, job, ended)
            awaited.append(ended)
            if choose.random() < 0.3:
                await deferLater(reactor, choose.random() / 100)
        if choose.random() < 0.02:
            self._kill()
        for ended in awaited:
            await ended

    def _submit(self, sleep: int, then: str) -> tuple[Job, Deferred[None]]:
        self._numbers += 1
        number = self._numbers
        job = Job(
            Stage.EOM,
            CONNECTION,
            message(number, sleep, then),
            queue_id=str(number),
            born=reactor.seconds(),
        )
        ended: Deferred[None] = Deferred()

        def tell(outcome: Any) -> None:
            self._check(number, then, outcome)
            ended.callback(None)

        try:
            answer = self.dispatcher.submit(job)
        except JobFailed as error:
            tell(error)
            return job, ended
        assert isinstance(answer, Deferred)
        answer.addBoth(tell)
        return job, ended

    def _check(self, number: int, then: str, outcome: Any) -> None:
        value = outcome.value if isinstance(outcome, Failure) else outcome
        said = value if isinstance(value, bytes) else f"{type(value).__name__} {value}".encode()
        wanted = {
            "answers": b"X-Number\0%d\0" % number,
            "raises": b"CallbackFailed ValueError: number=%d" % number,
            "exits": b"Poisoned",
        }[then]
        self.ends[then] += 1
        if wanted not in said.replace(b"\0 ", b"\0"):
            self.wrong.append(f"{number} {then}: {said!r}")

    def _cancel(self, job: Job, ended: Deferred[None]) -> None:
        if not ended.called:
            self.ends["cancelled"] += 1
            self.dispatcher.cancel(job)
            ended.callback(None)

    def _kill(self) -> None:
        serving = [shard for shard in self.pool.shards if shard.state is ShardState.SERVING]
        if serving:
            self.kills += 1
            self._random.choice(serving).kill(Loss("the test kills it", Blame.PLACE))


def main(count: int, seed: int, scans: str) -> None:
    """Prints a line of JSON."""
    runs = Runs(seed, scans)
    failures: list[str] = []

    def end(result: Any) -> None:
        if isinstance(result, Failure):
            failures.append(result.getTraceback())
        reactor.callLater(0.1, reactor.stop)

    reactor.callWhenRunning(lambda: ensureDeferred(runs.all(count)).addBoth(end))
    reactor.run()
    counters = runs.dispatcher.counters
    ended = sum(
        counters[f"attempts_{how}"] for how in ("answered", "lost", "superseded", "withdrawn")
    )
    report = {
        "failures": failures,
        "wrong": runs.wrong,
        "ends": runs.ends,
        "kills": runs.kills,
        "numbers": runs._numbers,
        "attempts": counters["attempts"],
        "ended": ended,
        "taken_over": counters["taken_over"],
        "queued": runs.dispatcher.queued,
        "shards": len(runs.pool.shards),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
