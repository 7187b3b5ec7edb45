"""The peers' table: which targets a run tells about, and that the bounds of ours serve at all."""

from __future__ import annotations

import pytest

from bench.peers import compare
from bench.report import Report, Row
from bench.subjects import BOUNDS, OURS, PEERS, Job, Subject
from sharded_milter.testing import load


def rows(**rates: float) -> list[Row]:
    return [{"milter": name.replace("_", " "), "mails/s": rate} for name, rate in rates.items()]


def test_a_run_is_compared_with_those_that_ran(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(pymilter=100.0, go_milter=1.0)
    table += [{"milter": OURS.name, "mails/s": 250.0}, {"milter": BOUNDS[0].name, "mails/s": 300.0}]
    compare(Report("?"), 0.0, 8, table)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "mails/s, sharded-milter / pymilter, 0 ms, 8 connections: 2.5 (target: at least 2): met",
        "mails/s, ours, --in-master / pymilter, 0 ms, 8 connections: 3 (target: at least 3.5):"
        " missed",
    ]


@pytest.mark.parametrize(("ms", "connections"), [(0.0, 1), (5.0, 8)])
def test_there_are_targets_for_some_loads_only(
    ms: float, connections: int, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("?")
    capsys.readouterr()
    compare(report, ms, connections, rows(sharded_milter=1.0, pymilter=1.0))
    assert capsys.readouterr().out == ""


def test_every_row_of_the_table_has_a_name_of_its_own() -> None:
    names = [subject.name for subject in (OURS, *BOUNDS, *PEERS)]
    assert len(set(names)) == len(names)


@pytest.mark.integration
@pytest.mark.parametrize("subject", BOUNDS, ids=lambda subject: subject.name)
def test_the_bounds_of_ours_accept_every_message(subject: Subject) -> None:
    with subject.serving(Job()) as server:
        assert load.run(server.path, 5, 100).verdicts == {"accept": 100}
