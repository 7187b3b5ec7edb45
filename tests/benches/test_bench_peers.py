"""The peers' table: which targets a run tells about, and that the bounds of ours serve at all."""

from __future__ import annotations

import pytest

from bench.client import Load, drive
from bench.peers import compare, rows
from bench.report import Report
from bench.subjects import (
    BOUNDS,
    IN_MASTER,
    OURS,
    OURS_COUNTING,
    PEERS,
    PYMILTER,
    PYMILTER_COUNTING,
    WITH_A_SCRIPT,
    Job,
    Subject,
    all_serving,
    installed,
)

from .runs import run

RUNS = {
    OURS.name: [run(250, 80), run(300, 100), run(200, 95)],
    IN_MASTER.name: [run(300), run(360), run(240)],
    PYMILTER.name: [run(100), run(100), run(100)],
    "go-milter": [run(1)] * 3,
}


def test_a_run_is_compared_with_those_that_ran(capsys: pytest.CaptureFixture[str]) -> None:
    compare(Report("?"), 0.0, 8, RUNS)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "master's CPU of a cheap message, 8 connections: 95 µs (rounds 80.0 to 100)"
        " (target: at most 90 µs): missed",
        "mails/s, sharded-milter / pymilter, 0 ms, 8 connections: 2.5 (rounds 2 to 3)"
        " (target: at least 2): met",
        "mails/s, ours, --in-master / pymilter, 0 ms, 8 connections: 3 (rounds 2.4 to 3.6)"
        " (target: at least 3.5): missed",
    ]


@pytest.mark.parametrize(("ms", "connections"), [(0.0, 1), (5.0, 8)])
def test_there_are_targets_for_some_loads_only(
    ms: float, connections: int, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("?")
    capsys.readouterr()
    compare(report, ms, connections, RUNS)
    assert capsys.readouterr().out == ""


def test_a_ratio_is_that_of_each_round_and_not_of_the_medians() -> None:
    uneven = {
        OURS.name: [run(100), run(200), run(300)],
        PYMILTER.name: [run(50), run(50), run(300)],
    }
    [_, row] = rows([OURS, PYMILTER], uneven)
    assert (row["ours/it"], row["rounds"], row["mails/s"]) == (2.0, "1 to 4", 50.0)


def test_every_row_of_the_table_has_a_name_of_its_own() -> None:
    names = [subject.name for subject in (OURS, *BOUNDS, *PEERS)]
    assert len(set(names)) == len(names)


@pytest.mark.integration
@pytest.mark.parametrize("subject", BOUNDS, ids=lambda subject: subject.name)
def test_the_bounds_of_ours_accept_every_message(subject: Subject) -> None:
    with subject.serving(Job()) as server:
        assert drive(server, Load(5, messages=100)).verdicts == {"accept": 100}


@pytest.mark.integration
def test_both_sides_count_and_both_run_the_script() -> None:
    sides = [OURS_COUNTING, PYMILTER_COUNTING], [PYMILTER, WITH_A_SCRIPT]
    for subjects in sides:
        with all_serving(installed(subjects, print), Job()) as servers:
            for server in servers.values():
                assert drive(server, Load(2, messages=6)).verdicts == {"accept": 6}
