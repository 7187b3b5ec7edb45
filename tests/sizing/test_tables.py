"""Tables fit on a terminal and show the figures."""

from __future__ import annotations

from io import StringIO

import pytest
from measurements import measurement
from rich.console import Console

from sharded_milter.protocol.stages import Stage
from sharded_milter.sizing.tables import cell, resident, tables
from sharded_milter.testing.load import Result


def test_three_tables_of_all_runs() -> None:
    early = Result(10.0, [0.1] * 100, {"reject": 100}, 0.5, {Stage.MAIL: 10.0})
    runs = [measurement(), measurement(workers=8, load=early)]
    console = Console(file=StringIO(), width=80)
    for each in tables(runs):
        console.print(each)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("accept 97, reject 3", "eom queue", "mail", "38%", "1.20"):
        assert words in text
    assert "…" not in text
    assert resident(runs) == "resident memory: master 50.0 MB, each worker 40.0 MB"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (7, "7"), ("x", "x"), (None, "-")],
)
def test_digits_that_mean_nothing_are_left_out(value: object, text: str) -> None:
    assert cell(value) == text


def test_what_a_short_run_has_computed_is_not_known() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(tables([measurement(window=0.1)])[1])
    (row,) = console.file.getvalue().splitlines()[4:5]  # type: ignore[attr-defined]
    assert row.split() == ["2", *"------"]
