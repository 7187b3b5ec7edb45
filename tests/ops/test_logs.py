"""Log lines: for a terminal with time and level, for journald with a severity on each line."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from sharded_milter.ops.logs import LEVELS, LineObserver, takes


def logged(*, journald: bool, level: str = "info", text: str = "{x}", **values: Any) -> str:
    stream = io.StringIO()
    log = Logger("sharded_milter.test", observer=LineObserver(stream, journald=journald))
    if "failure" in values:
        log.failure(text, values.pop("failure"), **values)
    else:
        log.emit(LogLevel.levelWithName(level), text, **values)
    return stream.getvalue()


@pytest.mark.parametrize("level", [*LEVELS, "critical"])
def test_a_line_for_a_terminal_has_time_and_level(level: str) -> None:
    time, name, rest = logged(journald=False, level=level, x="hello [world] there").split(None, 2)
    assert len(time) == len("2026-01-01T00:00:00+0000")
    assert (name, rest) == (level, "hello [world] there\n")


@pytest.mark.parametrize(
    ("level", "severity"),
    [("debug", 7), ("info", 6), ("warn", 4), ("error", 3), ("critical", 2)],
)
def test_a_line_for_journald_has_a_severity(level: str, severity: int) -> None:
    assert logged(journald=True, level=level, x="hello") == f"<{severity}>hello\n"


def test_every_line_for_journald_has_it() -> None:
    assert logged(journald=True, level="error", x="one\n\ttwo\nthree\n") == (
        "<3>one\n<3>\ttwo\n<3>three\n"
    )


def test_lines_for_a_terminal_keep_their_indent() -> None:
    assert logged(journald=False, x="one\n\ttwo\n  three").endswith("one\n\ttwo\n  three\n")


def test_braces_in_a_value_are_no_format() -> None:
    assert logged(journald=True, x="{y} {0!r:>9}") == "<6>{y} {0!r:>9}\n"


def test_a_failure_brings_its_traceback() -> None:
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        text = logged(journald=True, text="went wrong", failure=Failure())
    assert text.startswith("<2>went wrong\n<2>Traceback")
    assert text.endswith("<2>builtins.ZeroDivisionError: division by zero\n")


def test_an_event_without_text_is_no_line() -> None:
    stream = io.StringIO()
    LineObserver(stream, journald=False)({"log_level": LogLevel.info})
    assert stream.getvalue() == ""


SCRIPT = """
import sys
from twisted.logger import Logger
from sharded_milter.ops import logs
logs.begin(sys.argv[1], {name: "1" for name in sys.argv[2:]})
for namespace in ("sharded_milter.x", "others.x"):
    for level in ("debug", "info", "warn", "error"):
        getattr(Logger(namespace), level)("|{n} {l}", n=namespace.partition(".")[0], l=level)
print("printed")
"""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("journal", [[], ["JOURNAL_STREAM"]], ids=["terminal", "journald"])
def test_we_are_heard_from_the_level_on_and_others_when_they_warn(
    level: str, journal: list[str]
) -> None:
    command = [sys.executable, "-c", SCRIPT, level, *journal]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    prefixes, texts = zip(*(line.split("|") for line in done.stderr.splitlines()), strict=True)
    ours = [f"sharded_milter {each}" for each in LEVELS[LEVELS.index(level) :]]
    assert list(texts) == [*ours, "others warn", "others error"]
    assert {prefix[0] == "<" for prefix in prefixes} == {bool(journal)}
    assert done.stdout == "printed\n"


def test_a_level_takes_itself_and_what_is_worse() -> None:
    taken = {level: [what for what in LEVELS if takes(level, what)] for level in LEVELS}
    assert taken == {level: list(LEVELS[place:]) for place, level in enumerate(LEVELS)}
