"""Each limit is told from the others, with the figures that show it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.sizing.bottleneck import Limit, Use, bottleneck, counted, some

IDLE = Use(
    seconds=10.0, cores=4, workers=2, connections=8, master=0.1, computing=0.1, client=0.05,
    others=0.0, queued=0.0, asked=0.1,
)  # fmt: skip

CASES = {
    "the master computes all the time": ({"master": 0.97, "computing": 1.2}, Limit.MASTER),
    "the workers compute all the time": ({"computing": 1.9, "queued": 6.0}, Limit.WORKERS),
    "both do, the workers more": ({"computing": 1.98, "master": 0.9}, Limit.WORKERS),
    "the client computes all the time": ({"client": 0.99, "computing": 1.0}, Limit.CLIENT),
    "no core is left, workers have most": (
        {"cores": 2, "workers": 4, "computing": 1.6, "master": 0.2}, Limit.WORKERS,
    ),
    "no core is left, the master has most": (
        {"cores": 1, "computing": 0.3, "master": 0.5}, Limit.MASTER,
    ),
    "no core is left, the client has most": (
        {"cores": 1, "computing": 0.2, "client": 0.5, "master": 0.2}, Limit.CLIENT,
    ),
    "no core is left, others have most": (
        {"cores": 2, "computing": 0.5, "others": 1.2}, Limit.OTHERS,
    ),
    "others have the cores, scans wait": (
        {"cores": 2, "computing": 0.02, "others": 1.9, "asked": 2.0, "queued": 6.0}, Limit.QUEUE,
    ),
    "others have the cores, scans want them": (
        {"cores": 2, "computing": 0.2, "others": 1.6, "asked": 2.0, "queued": 6.0}, Limit.OTHERS,
    ),
    "others have the cores, and one connection sends": (
        {"cores": 2, "others": 1.9, "asked": 0.9, "connections": 1}, Limit.NONE,
    ),
    "others have the cores that a milter in the master wants": (
        {"cores": 2, "workers": 0, "computing": 0.0, "others": 1.9}, Limit.OTHERS,
    ),
    "others have the cores, one connection to the master": (
        {"cores": 2, "workers": 0, "computing": 0.0, "others": 1.9, "connections": 1}, Limit.NONE,
    ),
    "too short for the clocks": ({"seconds": 0.1, "master": 3.0, "computing": 2.0}, Limit.NONE),
    "too short to say that messages wait": (
        {"seconds": 0.1, "asked": 1.95, "queued": 6.0}, Limit.NONE,
    ),
    "workers die in a short time": ({"seconds": 0.1, "lost": 1, "master": 3.0}, Limit.LOST),
    "workers die": ({"lost": 3}, Limit.LOST),
    "workers die and messages wait": ({"lost": 3, "asked": 2.0, "queued": 6.0}, Limit.LOST),
    "workers die and others compute": ({"lost": 1, "cores": 2, "others": 1.9}, Limit.LOST),
    "workers die, the others compute all the time": (
        {"lost": 1, "computing": 1.9}, Limit.WORKERS,
    ),
    "workers die with what is never answered": ({"lost": 1, "unanswered": 2}, Limit.LOST),
    "scans hang": ({"unanswered": 2}, Limit.STUCK),
    "scans hang and others compute": ({"unanswered": 2, "cores": 2, "others": 1.9}, Limit.STUCK),
    "scans compute for ever": ({"unanswered": 2, "computing": 1.9}, Limit.WORKERS),
    "scans wait, and messages for them": ({"asked": 1.95, "queued": 6.0}, Limit.QUEUE),
    "more are asked early than there are workers": ({"asked": 6.0}, Limit.QUEUE),
    "scans wait, and no message does": ({"asked": 1.95, "queued": 0.1}, Limit.NONE),
    "workers wait for messages": ({"asked": 0.9, "queued": 0.2}, Limit.NONE),
    "nothing happens": ({}, Limit.NONE),
    "no worker at all": ({"workers": 0, "computing": 0.0, "asked": 5.0}, Limit.NONE),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "limit"), CASES.values(), ids=CASES)
def test_the_limit(changed: dict[str, Any], limit: Limit) -> None:
    assert bottleneck(replace(IDLE, **changed)).limit is limit


def why(**changed: Any) -> str:
    return str(bottleneck(replace(IDLE, **changed)))


def test_the_master_is_shown_to_be_full() -> None:
    assert why(master=0.97, computing=1.2) == (
        "master: its one process used 0.97 of a core, 2.2 of 4 cores were in use; a second service"
        " with a socket of its own helps, more workers do not"
    )
    assert why(master=0.97, cores=1).endswith("; more cores help, more workers do not")


def test_more_workers_help_as_long_as_there_are_cores() -> None:
    assert why(computing=1.9) == (
        "workers: 2 workers computed on 1.90 cores, 2.0 of 4 cores were in use; more workers help"
    )
    assert why(computing=1.9, cores=2).endswith(
        "2.0 of 2 cores were in use; more cores or a cheaper scan help, more workers do not"
    )


def test_scans_that_wait_need_more_workers() -> None:
    assert why(asked=2.0, queued=6.0) == (
        "queue: 6.0 messages waited for a worker, though 2 workers computed on only 0.10 cores:"
        " scans wait for something else (network, disk, locks); more workers help"
    )


def test_a_light_load_says_nothing() -> None:
    assert why(asked=1.2) == (
        "none: 0.2 of 4 cores were in use, and 1.2 of 2 workers had a message: the load was too"
        " light to find a limit; give more --connections"
    )
    assert "the milter in the master waits" in why(workers=0)


def test_workers_that_die_are_no_light_load() -> None:
    assert why(lost=3) == (
        "workers died: 3 workers died and messages waited for replacements, 0.2 of 4 cores were in"
        " use: find out why they die"
    )
    assert why(lost=1).startswith("workers died: 1 worker died and")


def test_scans_that_hang_are_no_light_load() -> None:
    assert why(unanswered=1200) == (
        "no answer: 1,200 messages had none, and the workers that scan them take no others:"
        " find out where the scan hangs"
    )


def test_a_short_run_says_nothing() -> None:
    assert why(seconds=0.007, master=3.0) == (
        "none: 0.007 s are too short to find a limit; run it for longer"
    )


def test_what_others_take_is_said() -> None:
    assert "load client: this program used 0.90 of a core" in why(client=0.9)
    assert why(cores=2, others=1.75) == (
        "other programs: 2.0 of 2 cores were in use (1.8 by other programs): measure again when"
        " the machine is idle"
    )


AMOUNTS = st.floats(0, 100)


@given(
    st.builds(
        Use,
        seconds=st.floats(0.5, 100), cores=st.integers(1, 64), workers=st.integers(0, 64),
        connections=st.integers(1, 64),
        lost=st.integers(0, 2), unanswered=st.integers(0, 2), master=AMOUNTS, computing=AMOUNTS,
        client=AMOUNTS, others=AMOUNTS, queued=AMOUNTS, asked=AMOUNTS,
    )
)  # fmt: skip
def test_there_is_always_an_answer_of_one_line(use: Use) -> None:
    text = str(bottleneck(use))
    assert "\n" not in text
    if use.full and use.others < use.master:
        assert bottleneck(use).limit in (Limit.MASTER, Limit.WORKERS, Limit.CLIENT)
    if use.lost or use.unanswered:
        assert bottleneck(use).limit not in (Limit.NONE, Limit.QUEUE, Limit.OTHERS)


def test_one_worker_is_no_plural() -> None:
    assert [some(1), some(2)] == ["1 worker", "2 workers"]
    assert counted(1000, "message") == "1,000 messages"
