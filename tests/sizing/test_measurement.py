"""A run's figures: averages, where messages waited, and the JSON file."""

from __future__ import annotations

import json

import pytest
from measurements import measurement

from sharded_milter.protocol.stages import Stage
from sharded_milter.sizing.bottleneck import Use
from sharded_milter.testing.load import Result


def test_averages_are_over_the_run() -> None:
    assert measurement().use == Use(
        seconds=10.0, cores=4, workers=2, connections=4, master=0.1, computing=1.2, client=0.05,
        others=0.2, queued=1.5, asked=2.2,
    )  # fmt: skip
    assert (measurement().master_cpu, measurement().workers_cpu) == (0.01, 0.12)


def test_cpu_is_divided_by_the_time_in_which_it_was_used() -> None:
    assert measurement(window=20.0).use.total == pytest.approx(measurement().use.total / 2)
    assert measurement(window=20.0).load.rate == 10.0


def test_what_went_wrong_is_known_to_the_bottleneck() -> None:
    load = Result(1.0, [0.1], {"accept": 1}, unanswered=7)
    use = measurement(lost=("exited with code 3",) * 2, load=load).use
    assert (use.lost, use.unanswered) == (2, 7)


def test_waiting_is_shared_out_among_stages_and_the_parts_of_the_end() -> None:
    shares = measurement().shares()
    assert list(shares) == ["rcpt", "eom queue", "eom scan", "eom rest"]
    assert list(shares.values()) == pytest.approx([0.25, 0.375, 0.3, 0.075])


def test_rounded_log_lines_leave_no_negative_rest() -> None:
    assert measurement(scanned=20.0).shares()["eom rest"] == 0.0


def test_a_milter_that_answers_before_the_end_has_no_parts_of_it() -> None:
    early = Result(1.0, [0.1], {"reject": 1}, 0.1, {Stage.MAIL: 0.1})
    assert measurement(load=early, queued=0.0, scanned=0.0).shares() == {"mail": 1.0}
    nothing = Result(1.0, [0.1], {"reject": 1}, 0.1, {})
    assert measurement(load=nothing).shares() == {}


def test_the_json_has_everything() -> None:
    saved = json.loads(json.dumps(measurement(failed=("x",), lost=("y", "z")).as_json()))
    assert saved["messages_per_second"] == 10.0
    assert saved["latency_ms"] == {"p50": 100, "p90": 100, "p99": 100, "max": 100}
    assert saved["cpu_ms_per_message"] == {"master": 10.0, "workers": 120.0, "client": 5.0}
    assert saved["answered_by_policy"] == 1
    assert (saved["workers_died"], saved["unanswered"]) == (2, 0)
    assert saved["bottleneck"]["limit"] == "workers died"
