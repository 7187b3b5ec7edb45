"""Slow messages after many cheap ones: each is scanned once, and none waits for long."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from simulated import STEP, Simulated

from sharded_milter.dispatch.affinity import ObjectAffinity
from sharded_milter.dispatch.timeouts import TAKEOVER_AFTER


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", ["plain", "keys", "objects", "ahead", "deaths"])
def test_each_message_is_scanned_once_and_none_is_later_than_the_slow_ones_take(
    count: int, shape: str
) -> None:
    house = Simulated(count, command_deadline=60.0)
    slow, cheap = 2 * count, 10
    names = [f"slow {n}" for n in range(slow)] + [f"quick {n}" for n in range(cheap)]
    start = house.clock.seconds()
    for number, name in enumerate(names):
        options: dict[str, Any] = {}
        if shape == "keys":
            options["key"] = b"%d" % (number % 2)
        if shape == "objects":
            options["affinity"] = ObjectAffinity(replayable=True)
        house.send(name, 1.0 if name.startswith("slow") else 0.0, **options)
        if shape == "ahead":
            house.run(STEP)
    slowest, deaths = slow / count, 0
    if shape == "objects":  # they stay with their shard, so one may have more than its share
        slowest = slow
    if shape == "deaths":
        house.run(0.5)
        victim: Any = house.shards[0]
        lost = victim.jobs[0].queue_id
        victim.die()
        house.hire_scanning()
        slowest, deaths = slow / count + 1.0, 1
    house.run(slowest + 0.5)
    scans = Counter(house.scans)
    assert set(house.ended) == set(names)
    if deaths:
        assert scans.pop(lost) == 2
    assert set(scans.values()) == {1}
    assert max(house.ended.values()) - start <= slowest + 2 * TAKEOVER_AFTER


def test_a_message_behind_a_slow_one_waits_no_longer_than_50_ms_for_an_idle_shard() -> None:
    house = Simulated(2)
    start = house.clock.seconds()
    house.send("slow", 1.0)
    house.send("other", 0.01)
    house.send("behind", 0.0)
    house.run(2.0)
    assert house.ended["behind"] - start <= TAKEOVER_AFTER + 0.01
    assert sorted(house.scans) == ["behind", "other", "slow"]
