"""Each way to be limited is told from the others, with the figures that prove it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.sizing.bottleneck import Limit, Use, bottleneck, some

IDLE = Use(
    cores=4, workers=2, master=0.1, computing=0.1, client=0.05, others=0.0, queued=0.0, asked=0.1
)

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
        "none: 0.2 of 4 cores were in use, and of 2 workers 1.2 had a message: the load was too"
        " light to find a limit; more --connections would show more"
    )
    assert "the milter in the master waits" in why(workers=0)


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
        cores=st.integers(1, 64), workers=st.integers(0, 64), master=AMOUNTS, computing=AMOUNTS,
        client=AMOUNTS, others=AMOUNTS, queued=AMOUNTS, asked=AMOUNTS,
    )
)  # fmt: skip
def test_there_is_always_an_answer_of_one_line(use: Use) -> None:
    text = str(bottleneck(use))
    assert "\n" not in text
    if use.full:
        assert bottleneck(use).limit not in (Limit.NONE, Limit.QUEUE)


def test_one_worker_is_no_plural() -> None:
    assert [some(1), some(2)] == ["1 worker", "2 workers"]
