"""What troubles a daemon while it serves, and how many temporary refusals each trouble excuses."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bench.chaos.kinds import Kind
from bench.server import Server

# Seconds to the first, and between two of them on average. A reload of two workers takes one.
FIRST_AFTER = 0.2
KILL_EVERY = 0.7
HUP_EVERY = 1.5

# A worker that dies again and again comes back later each time, 6 s after the sixth; what that
# does to the rate is no question of this bench.
MOST_KILLS = 8

# Answers after which a worker is replaced.
MAX_MESSAGES = 60

# Of all processes. The master alone has about 20 open with two workers.
DESCRIPTORS = 60

# The share of messages that may fail for it: half of them need one, and 1 to 4 of 100 were refused.
SHORT = 0.25

# Connections that come and go without a word when descriptors are short, and how often, in seconds.
# A daemon that has none left accepts no more than some dozens of connections a second.
IDLERS = 50
IDLE_EVERY = 0.04

Act = Callable[[Server, random.Random, Counter[str]], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Setting:
    """What the number of refusals depends on."""

    kind: Kind
    mtas: int
    messages: int


@dataclass(frozen=True)
class Trouble:
    """Options and acts; `excuses` says how many temporary refusals there may be, `why` why."""

    why: str
    excuses: Callable[[Setting, Counter[str]], int]
    arguments: tuple[str, ...] = ()
    acts: tuple[Act, ...] = ()
    descriptors: int = 0
    mtas: int = 20


async def kill_workers(server: Server, rnd: random.Random, counts: Counter[str]) -> None:
    """Kills a random worker now and then; only children of this daemon."""
    wait = FIRST_AFTER
    while counts["kills"] < MOST_KILLS:
        await asyncio.sleep(wait)
        wait = KILL_EVERY * (0.5 + rnd.random())
        if workers := server.workers():
            with suppress(ProcessLookupError):
                os.kill(rnd.choice(workers), signal.SIGKILL)
                counts["kills"] += 1


async def reload(server: Server, rnd: random.Random, counts: Counter[str]) -> None:
    """Sends HUP now and then."""
    wait = FIRST_AFTER
    while True:
        await asyncio.sleep(wait)
        wait = HUP_EVERY * (0.5 + rnd.random())
        server.process.send_signal(signal.SIGHUP)
        counts["hups"] += 1


async def come_and_go(server: Server, rnd: random.Random, counts: Counter[str]) -> None:
    """Opens and closes connections on which nothing is said."""
    held = list[asyncio.StreamWriter]()
    try:
        while True:
            await asyncio.sleep(IDLE_EVERY)
            with suppress(OSError):
                held.append(await _connected(server.path))
                counts["idlers"] += 1
            while len(held) > rnd.randint(0, IDLERS):
                held.pop(rnd.randrange(len(held))).close()
    finally:
        for writer in held:
            writer.close()


async def _connected(target: str) -> asyncio.StreamWriter:
    if target.startswith("/"):
        return (await asyncio.open_unix_connection(target))[1]
    host, _, port = target.rpartition(":")
    return (await asyncio.open_connection(host, int(port)))[1]


def _none(setting: Setting, counts: Counter[str]) -> int:
    return 0


def _of_deaths(setting: Setting, counts: Counter[str]) -> int:
    """A worker has at most one message of each MTA in hand.

    Those of objects that cannot be rebuilt are refused; others are tried again, and refused only
    when that worker is killed too.
    """
    each = setting.mtas if not setting.kind.movable else setting.mtas // 2
    return counts["kills"] * each


def _of_reloads(setting: Setting, counts: Counter[str]) -> int:
    """Of a kind that cannot move, each MTA is told once that its object is gone."""
    return 0 if setting.kind.movable else counts["hups"] * setting.mtas


def _of_descriptors(setting: Setting, counts: Counter[str]) -> int:
    """A large message or answer needs a descriptor for a while; one that finds none may fail."""
    return int(setting.messages * SHORT)


def _of_all(setting: Setting, counts: Counter[str]) -> int:
    each = (_of_deaths, _of_reloads, _of_descriptors)
    return sum(excuses(setting, counts) for excuses in each)


TROUBLES = {
    "none": Trouble("a daemon that has what it needs refuses nothing", _none),
    "kills": Trouble("a killed worker had messages in hand", _of_deaths, acts=(kill_workers,)),
    "recycling": Trouble(
        "a worker is replaced when it is through", _none, ("--max-messages", str(MAX_MESSAGES))
    ),
    "hups": Trouble("a reload replaces workers when they are through", _of_reloads, acts=(reload,)),
    "descriptors": Trouble(
        "there is not room for all connections", _of_descriptors, acts=(come_and_go,),
        descriptors=DESCRIPTORS, mtas=24,
    ),
    "all": Trouble(
        "there is not room for all connections", _of_all, ("--max-messages", str(MAX_MESSAGES)),
        acts=(kill_workers, reload, come_and_go), descriptors=DESCRIPTORS, mtas=24,
    ),
}  # fmt: skip
