"""The options of `bench` and `tune` reach the daemon and the load client."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
from measurements import measurement
from rich.console import Console

from sharded_milter.cli.bench import progress, warn
from sharded_milter.cli.load_options import (
    CONNECTIONS_PER_WORKER,
    GENERATED,
    Counts,
    OutputFile,
    Screen,
    plan,
    save,
    with_load_options,
)
from sharded_milter.cli.tune import _others, _warn_of_others
from sharded_milter.errors import UsageError
from sharded_milter.sizing.processes import Cpu
from sharded_milter.sizing.runs import Plan
from sharded_milter.testing.load import UNLIMITED, Result


class Paper(Screen):
    """A screen whose output can be read."""

    @classmethod
    def blank(cls, *, terminal: bool = False) -> Paper:
        def console() -> Console:
            return Console(
                file=StringIO(), force_terminal=terminal, width=80, highlight=False, markup=False
            )

        return cls(console(), console())

    def read(self) -> tuple[str, str]:
        """Return the output and the warnings."""
        return self.out.file.getvalue(), self.err.file.getvalue()  # type: ignore[attr-defined]


def planned(*arguments: str, counts: tuple[int, ...] = (1, 2)) -> tuple[Plan, str, str]:
    """Return the plan of a command line, and the output about it."""
    paper = Paper.blank()

    @click.command()
    @with_load_options(7.0)
    def command(**values: Any) -> Plan:
        return plan(values, counts, 7.0, paper)

    made = command.main(list(arguments), standalone_mode=False)
    assert isinstance(made, Plan)
    return made, *paper.read()


def test_what_is_not_said_is_sensible() -> None:
    made, said, warned = planned()
    assert (made.arguments, made.connections) == ((), 2 * CONNECTIONS_PER_WORKER)
    assert (made.seconds, made.messages) == (7.0, UNLIMITED)
    assert len(made.content) == GENERATED
    assert said.startswith(
        "64 generated messages of 11.1 KB on average over 8 connections, 7 s each"
    )
    assert (said.count("\n"), warned) == (1, "")


def test_the_daemon_gets_its_own_options() -> None:
    made, _, _ = planned("--pymilter=x.py", "--config", "y", "--in-master", "z:m", "--", "-a", "b")
    assert made.arguments == ("--config=y", "--pymilter=x.py", "--in-master=z:m", "--", "-a", "b")


def test_a_number_of_messages_instead_of_a_time() -> None:
    made, said, _ = planned("--count", "12", "--connections", "3")
    assert (made.seconds, made.messages, made.connections) == (float("inf"), 12, 3)
    assert "over 3 connections, 12 each" in said
    with pytest.raises(UsageError, match="--count and --seconds cannot be given together"):
        planned("--count", "12", "--seconds", "1")


def test_what_is_no_message_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.eml").write_bytes(b"A: b\n\nc\n")
    (tmp_path / "b.eml").write_bytes(b"")
    made, said, warned = planned("--messages", str(tmp_path))
    assert len(made.content) == 1
    assert said.startswith("1 different message of 0.0 KB on average over 8 connections,")
    (tmp_path / "a.eml").write_bytes(b"A: b\n\n" + 40_000 * (b"c" * 70 + b"\n"))
    _, said, _ = planned("--messages", str(tmp_path), "--connections", "1")
    assert said.startswith("1 different message of 2.9 MB on average over 1 connection, 7 s each;")
    assert warned == f"{tmp_path}/b.eml: skipped: it is empty\n"


@pytest.mark.parametrize(
    ("text", "counts"), [("4", (4,)), ("1,2,4", (1, 2, 4)), (" 2, 1,2", (2, 1)), ((3,), (3,))]
)
def test_numbers_of_workers(text: Any, counts: tuple[int, ...]) -> None:
    assert Counts().convert(text, None, None) == counts


@pytest.mark.parametrize("text", ["", "0", "1,", "-1", "two", "1;2", "²", "1.5"])
def test_what_is_no_number_of_workers(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a number of workers"):
        Counts().convert(text, None, None)


def test_a_file_that_cannot_be_written_is_refused_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = OutputFile(dir_okay=False)
    assert kind.convert(f"{tmp_path}/new", None, None) == tmp_path / "new"
    with pytest.raises(click.BadParameter, match="cannot be written"):
        kind.convert(f"{tmp_path}/nothing/new", None, None)
    with pytest.raises(click.BadParameter, match="is a directory"):
        kind.convert(str(tmp_path), None, None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(click.BadParameter, match="cannot be written"):
        kind.convert(f"{tmp_path}/new", None, None)


def test_figures_are_saved_where_there_is_a_path(tmp_path: Path) -> None:
    made = Plan(("--", "a:b"), [[]], 4, 2)
    save(None, made, [measurement()])
    save(tmp_path / "f", made, [measurement()], {"recommended_workers": 2})
    saved = json.loads((tmp_path / "f").read_text())
    assert saved["arguments"] == ["--", "a:b"]
    assert saved["runs"][0]["messages"] == 100
    assert (saved["recommended_workers"], saved["connections"]) == (2, 4)


def test_a_bar_is_only_on_a_terminal() -> None:
    for terminal in (True, False):
        paper = Paper.blank(terminal=terminal)
        with progress(paper, Plan((), [[]], 1, 1, seconds=1.0), 2) as next_run:
            for name in ("first", "second"):
                next_run(name)(0.5, 1234)
        assert ("second" in paper.read()[1], "1,234 messages" in paper.read()[1]) == (
            (terminal, terminal)
        )


def warnings(**changed: Any) -> str:
    paper = Paper.blank()
    warn(paper, [measurement(**changed)])
    return paper.read()[1]


def test_failures_are_no_speed() -> None:
    assert warnings() == ""
    failed = ("qid=1 at eom: ValueError: x", "qid=2 at eom: ValueError: x", "odd")
    assert warnings(failed=failed) == (
        "warning: with 2 workers the milter failed on 3 of 100 messages (2 times: at eom:"
        " ValueError: x); the figures include these failures\n"
    )
    assert "(1 time: odd)" in warnings(failed=("odd",))
    load = Result(1.0, [0.1] * 2, {"tempfail": 1, "accept": 1})
    assert warnings(load=load) == (
        "warning: with 2 workers the milter tempfailed 1 of 2 messages\n"
    )


def test_what_spoils_a_run_is_said() -> None:
    assert warnings(lost=("killed by SIGKILL", "exited with code 3", "exited with code 3")) == (
        "warning: with 2 workers 3 workers died during the run (2 times: exited with code 3);"
        " messages waited for replacements\n"
    )
    load = Result(10.0, [0.1] * 4, {"accept": 4}, unanswered=3)
    assert warnings(load=load, window=20.0) == (
        "warning: with 2 workers 3 messages had no verdict after 20.0 s; the figures do not include"
        " them\n"
    )
    assert warnings(load=Result(0.25, [0.1], {"accept": 1})) == (
        "warning: with 2 workers only 0.25 s were measured: this is too short for exact figures\n"
    )


def test_who_else_computes_spoils_a_recommendation() -> None:
    quiet, busy = Paper.blank(), Paper.blank()
    _warn_of_others(quiet, 0.1, 4)
    _warn_of_others(busy, 1.0, 4)
    assert quiet.read()[1] == ""
    assert busy.read()[1].startswith("warning: other programs used up to 1.0 of 4 cores;")


def test_who_else_computes_does_not_matter_to_scans_that_wait() -> None:
    waits = measurement(others=30.0, queued=60.0, scanned=20.0, cpu=Cpu(1.0, 0.5))
    computes = measurement(others=26.0, queued=60.0, scanned=20.0, cpu=Cpu(1.0, 12.0))
    assert _others([waits]) == 0.0
    assert _others([waits, computes]) == 2.6


def test_lines_are_wrapped_for_eyes_only() -> None:
    for terminal, lines in ((True, 3), (False, 1)):
        paper = Paper.blank(terminal=terminal)
        paper.print_line("word " * 40)
        paper.warn("word " * 40)
        assert [text.rstrip().count("\n") + 1 for text in paper.read()] == [lines, lines]


def test_both_outputs_are_wide_enough_where_nobody_looks() -> None:
    screen = Screen.make()
    assert [screen.out.width, screen.err.width] == [100, 100]
    assert screen.err.stderr
