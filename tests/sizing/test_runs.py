"""Runs: their progress, the median of several, and a daemon that fails."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from measurements import measurement

from sharded_milter.errors import StartError
from sharded_milter.sizing.runs import Plan, measure, middle
from sharded_milter.testing.dialogue import transaction
from sharded_milter.testing.generated import generated
from sharded_milter.testing.load import Result

CONTENT = [transaction(generated(body=10))]


def test_a_run_ends_by_the_clock_or_by_number() -> None:
    assert Plan((), CONTENT, 1, 1, seconds=4.0).done(1.0, 10**6) == pytest.approx(0.25, abs=0.01)
    assert Plan((), CONTENT, 1, 1, messages=8).done(100.0, 2) == 0.25
    assert Plan((), CONTENT, 1, 1, seconds=4.0).done(9.0, 1) == 1.0


@pytest.mark.parametrize(("rates", "rate"), [([3, 1, 2], 2), ([2, 1], 1), ([5], 5)])
def test_the_middle_round_counts(rates: list[int], rate: int) -> None:
    rounds = [measurement(load=Result(1.0, [0.1] * n, {})) for n in rates]
    assert middle(rounds).load.rate == rate


def test_a_daemon_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    milter = tmp_path / "kills.py"
    milter.write_text(
        "import os, signal\n"
        "from sharded_milter import Message, Milter\n"
        'milter = Milter("kills")\n'
        "@milter.eom\n"
        "def scan(message: Message) -> None:\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
    )
    plan = Plan((f"{milter}:milter",), CONTENT, 1, os.cpu_count() or 1, messages=1)
    with pytest.raises(StartError) as caught:
        measure(plan, 1, lambda seconds, answered: None)
    assert str(caught.value) == (
        f"the daemon ended with {-signal.SIGKILL} while it was measured"
    ) or "closed the connection" in str(caught.value)
    assert "ready with 1 workers" in caught.value.details
