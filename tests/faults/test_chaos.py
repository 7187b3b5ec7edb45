"""Badly behaving MTAs and troubled workers: every answer is its own, and a mixed one is noticed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.chaos.attack import attack
from bench.chaos.daemon import serving
from bench.chaos.kinds import KINDS
from bench.chaos.liar import LIES, lying
from bench.chaos.mta import Account, Manner
from bench.chaos.plan import Combination, run
from bench.server import Server

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

MESSAGES = 300

#: Each kind of milter but a script, each trouble but a lack of descriptors, and both sockets.
SELECTION = [
    Combination("functions", "kills", "unix"),
    Combination("replayable", "kills", "tcp"),
    Combination("plain", "hups", "unix"),
    Combination("several", "recycling", "tcp"),
    Combination("in-master", "none", "unix"),
]

#: What a mixed answer is told as.
FOREIGN = {
    "swapped": "got the answer of message",
    "swapped-action": "got the answer of message",
    "swapped-body": "got the new body of message",
    "swapped-recipient": "got for the recipient",
    "twice": "was told what nobody had asked",
    "late": "got the answer of message",
}


@pytest.mark.parametrize("combination", SELECTION, ids=str)
def test_every_answer_is_of_its_own_message(combination: Combination) -> None:
    outcome = run(combination, MESSAGES, "tests")
    assert outcome.failures == []
    assert outcome.account.counts["messages"] == MESSAGES
    assert bool(outcome.troubles["kills"]) == (combination.trouble == "kills")
    assert bool(outcome.troubles["hups"]) == (combination.trouble == "hups")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Server]:
    with serving(["--workers", "2", *KINDS["functions"].arguments], tcp=False) as server:
        yield server


def lied(server: Server, lie: str) -> Account:
    """What is said of the answers of a daemon that were mixed on their way."""
    account = Account(KINDS["functions"].names)
    # An answer can come late only where messages are dropped while they wait.
    manner = Manner(timeout=1.5, abort_waiting=0.5 if lie == "late" else 0.06)

    async def play() -> None:
        async with lying(server.path, lie) as target:
            await attack(target, account, seed=lie, mtas=10, messages=MESSAGES, manner=manner)

    asyncio.run(play())
    return account


def test_a_lie_is_known_for_every_way_to_mix_answers() -> None:
    assert {*FOREIGN, "lost"} == set(LIES)


@pytest.mark.parametrize("lie", FOREIGN)
def test_a_mixed_answer_is_noticed_and_both_messages_are_named(daemon: Server, lie: str) -> None:
    account = lied(daemon, lie)
    told = [complaint for complaint in account.complaints if FOREIGN[lie] in complaint]
    assert account.counts["foreign"] == len(account.complaints) > 0
    assert told
    for complaint in told:
        assert complaint.count(f"{lie}-") >= 2, complaint


def test_a_lost_answer_is_noticed(daemon: Server) -> None:
    account = lied(daemon, "lost")
    assert account.counts["missing"] == len(account.complaints) > 0
    assert all(complaint.endswith("no answer in time") for complaint in account.complaints)


def test_answers_that_nobody_mixes_are_in_order(daemon: Server) -> None:
    account = Account(KINDS["functions"].names)
    asyncio.run(attack(daemon.path, account, seed="order", mtas=10, messages=MESSAGES))
    assert (account.complaints, account.tempfailed) == ([], set())


def test_the_command_fails_when_answers_are_swapped() -> None:
    command = ["-m", "bench.chaos", "--messages", "300", "--seed", "tests", "--lie", "swapped"]
    chosen = ["--kinds", "functions", "--troubles", "none", "--sockets", "unix"]
    done = subprocess.run(
        [sys.executable, *command, *chosen],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    [first, *_] = [line for line in done.stdout.splitlines() if "got the answer of" in line]
    assert first.count("message tests-0") == 2
