"""Workers that really scan, on a test's clock: each message takes the time that the test says."""

from __future__ import annotations

from typing import Any

from one_dispatcher import FakeShard, Workers
from one_pool import MANIFEST, Result

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.job import Job
from sharded_milter.protocol.stages import Stage

STEP = 0.001


class Scanning(FakeShard):
    """A worker: it does what it was given in order, but for what is withdrawn before it begins."""

    def __init__(self, slot: int, house: Simulated) -> None:
        super().__init__(slot, house.dispatcher, MANIFEST)
        self._house = house
        self._running: Any = None

    def give(self, number: int, job: Job) -> None:
        super().give(number, job)
        if self._running is None:
            self._begin()

    def withdraw(self, number: int) -> None:
        super().withdraw(number)
        if number != self.open[0]:
            self._house.clock.callLater(0, self._skip, number)

    def _skip(self, number: int) -> None:
        if number in self.withdrawals and number != self.open[0]:
            self.withdrawals.remove(number)
            self.withdrawals.insert(0, number)
            self.confirm()

    def _begin(self) -> None:
        while self.open and self.open[0] in self.withdrawals:
            self._running = True
            self.withdrawals.remove(self.open[0])
            self.withdrawals.insert(0, self.open[0])
            self.confirm()
        self._running = None
        if self.open:
            name = self.jobs[0].queue_id
            self._house.scans.append(name)
            took = self._house.takes.get(name, 0.0)
            self._running = self._house.clock.callLater(took, self._finish, self.open[0])

    def _finish(self, number: int) -> None:
        self._running = True  # it reads what comes meanwhile before it begins another
        self.answer(b"verdict")
        self._begin()

    def die(self) -> None:
        if self._running is not None:
            self._running.cancel()
        self.exit()


class Simulated(Workers):
    """A dispatcher whose workers scan; `takes` says how long, by the message's name."""

    def __init__(self, count: int, **limits: Any) -> None:
        self.scans: list[str] = []
        self.takes: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        super().__init__(0, **limits)
        for _ in range(count):
            self.hire_scanning()
        for number in range(60):  # cheap messages, so that all shards are given jobs ahead
            self.send(f"cheap {number}")
            self.run(STEP)
        self.scans.clear()
        self.ended.clear()

    def hire_scanning(self) -> Scanning:
        shard = Scanning(len(self.shards) + 1, self)
        self.shards.append(shard)
        self.dispatcher.serve(shard)
        return shard

    def send(
        self, name: str, takes: float = 0.0, affinity: ObjectAffinity | None = None, **options: Any
    ) -> Result:
        self.takes[name] = takes
        result = self.submit(Stage.EOM, queue_id=name, affinity=affinity, **options)
        if result.job.answer is not None:
            result.job.answer.addBoth(lambda _: self.ended.setdefault(name, self.clock.seconds()))
        return result

    def run(self, seconds: float) -> None:
        self.clock.pump([STEP] * round(seconds / STEP))
