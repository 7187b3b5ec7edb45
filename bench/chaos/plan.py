"""Every kind of milter under every trouble over every kind of socket, and what is wrong with it."""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bench.chaos.attack import attack
from bench.chaos.daemon import Figures, at_rest, end, own_failures, serving
from bench.chaos.kinds import KINDS
from bench.chaos.liar import lying
from bench.chaos.mta import Account, Manner
from bench.chaos.troubles import TROUBLES, Setting
from bench.server import Server

SOCKETS = ("unix", "tcp")

WORKERS = 2

# A daemon's memory is compared after this share of the messages and after all. A master of 41 MB
# has grown by about 25 MB after its first 400 messages, which is what was in flight and the holes
# that the allocator keeps, and by 2 MB more after 6,000.
FIRST = 0.3
SETTLED, SETTLING = 400, 25.0

# MB that it may have more once it has settled. A thousand of these messages have 60 MB.
GROWTH = 12.0

# As the log says that nothing is in hand.
QUIET = "0 connections, 0 jobs queued, 0 bytes"


@dataclass(frozen=True)
class Combination:
    """One attack of the plan."""

    kind: str
    trouble: str
    socket: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.trouble}, {self.socket}"


@dataclass
class Outcome:
    """What an attack has shown; `failures` is empty where everything was in order."""

    combination: Combination
    account: Account
    troubles: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    before: Figures | None = None
    after: Figures | None = None
    seconds: float = 0.0

    def row(self) -> dict[str, object]:
        """Its line in the table."""
        counts, acts = self.account.counts, self.troubles
        latencies = sorted(self.account.latencies) or [0.0]
        growth = self.after.memory - self.before.memory if self.before and self.after else None
        return {
            "attack": str(self.combination),
            "mails": counts["messages"],
            "own": counts["accepted"] + counts["refused"],
            "foreign": counts["foreign"],
            "missing": counts["missing"] + counts["closed"],
            "tempfail": len(self.account.tempfailed),
            "away": counts["turned away"],
            "kills": acts["kills"],
            "HUPs": acts["hups"],
            "p50 ms": 1000 * latencies[len(latencies) // 2],
            "max ms": 1000 * latencies[-1],
            "MB": growth,
            "failed": len(self.failures),
        }


def run(
    combination: Combination,
    messages: int,
    seed: str,
    *,
    manner: Manner | None = None,
    lie: str = "",
    python: str = sys.executable,
    keep: Path | None = None,
) -> Outcome:
    """One attack on a daemon of its own; with `lie`, its answers are mixed on their way.

    The log of a daemon that failed is kept in the directory `keep`.
    """
    kind, trouble = KINDS[combination.kind], TROUBLES[combination.trouble]
    outcome = Outcome(combination, Account(kind.names))
    rnd = random.Random(seed)
    arguments = ["--workers", str(WORKERS), *trouble.arguments, *kind.arguments]

    async def play(server: Server, name: str, count: int) -> None:
        acts = [act(server, rnd, outcome.troubles) for act in trouble.acts]
        async with lying(server.path, lie) as target:
            await attack(
                target, outcome.account, seed=name, mtas=trouble.mtas, messages=count,
                manner=manner, troubles=acts,
            )  # fmt: skip

    first = int(messages * FIRST)
    with serving(
        arguments, tcp=combination.socket == "tcp", descriptors=trouble.descriptors, python=python
    ) as server:
        began = time.monotonic()
        asyncio.run(play(server, f"{seed}a", first))
        outcome.before = at_rest(server, _is_quiet)
        asyncio.run(play(server, f"{seed}b", messages - first))
        outcome.seconds = time.monotonic() - began
        growth = GROWTH + SETTLING * max(0.0, 1 - first / SETTLED)
        outcome.after = at_rest(server, lambda now: not _changes(outcome.before, now, growth))
        outcome.failures += _changes(outcome.before, outcome.after, growth)
        outcome.failures += _judged(outcome, Setting(kind, trouble.mtas, messages))
        outcome.failures += own_failures(server)
        outcome.failures += [f"the end: {each}" for each in end(server)]
        if outcome.failures and keep is not None:
            shutil.copy(server.log, keep / f"{str(combination).replace(', ', '-')}.log")
    return outcome


def _is_quiet(now: Figures) -> bool:
    return now.workers == WORKERS and not now.zombies and now.in_hand.startswith(QUIET)


def _changes(before: Figures | None, now: Figures, growth: float) -> list[str]:
    """What has not come back to where it was."""
    assert before is not None
    found = []
    if not _is_quiet(now):
        found.append(f"not at rest: {now.workers} workers, {now.zombies} zombies, {now.in_hand}")
    if now.descriptors > before.descriptors:
        found.append(f"descriptors: {before.descriptors} before, {now.descriptors} after")
    if now.memory - before.memory > growth:
        found.append(f"memory: {before.memory:.1f} MB before, {now.memory:.1f} MB after")
    return found


def _judged(outcome: Outcome, setting: Setting) -> list[str]:
    account = outcome.account
    failures = list(account.complaints)
    trouble = TROUBLES[outcome.combination.trouble]
    excused = trouble.excuses(setting, outcome.troubles)
    # Where there is not room for all, connections are turned away as often as they come.
    turned_away = 0 if trouble.descriptors else account.counts["turned away"]
    if len(account.tempfailed) + turned_away > excused:
        each = ", ".join(f"{n} {c}" for n, c in account.counts.items() if n.startswith("tempfail"))
        failures.append(
            f"{len(account.tempfailed)} messages and {turned_away} connections were told to try"
            f" again ({each}), {excused} are excused: {trouble.why}"
        )
    if not account.counts["accepted"]:
        failures.append("no message was accepted")
    return failures


def combinations(
    kinds: tuple[str, ...] = tuple(KINDS),
    troubles: tuple[str, ...] = tuple(TROUBLES),
    sockets: tuple[str, ...] = SOCKETS,
) -> list[Combination]:
    """All of them, in the order of the plan."""
    return [Combination(k, t, s) for k in kinds for t in troubles for s in sockets]
