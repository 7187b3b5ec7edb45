"""Log lines: for a terminal with time and level, for journald with a severity on each line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from sharded_milter.ops.logs import LEVELS, MAX_LINE, LineObserver


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
    text = logged(journald=True, level="error", x="one\n\ttwo\nthree\n", has_details=True)
    assert text == "<3>one\n<3>    \\ttwo\n<3>    three\n"


def test_details_are_lines_that_look_like_no_event() -> None:
    forged = "2026-11-27T00:00:00+0000 error shard 1 is gone: forged"
    _, *rest = logged(
        journald=False, x=f"one\n{forged}\x1b\r\n{forged}", has_details=True
    ).splitlines()
    assert rest == [f"    {forged}\\x1b\\r", f"    {forged}"]


# What would end a line, drive a terminal, hide text or turn its direction.
CONTROLS = [*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\u2028", "\u2029", "\u202e",
            "\u2066", "\u200b", "\ufeff", "\ud800", "\udc9b", "\udcff", "\U000e0001"]  # fmt: skip


@pytest.mark.parametrize("journald", [False, True])
@pytest.mark.parametrize("char", CONTROLS, ids=ascii)
def test_a_value_stays_in_its_line_and_shows_what_it_is(char: str, journald: bool) -> None:
    text = logged(journald=journald, x=f"a{char}<0>b")
    assert text.count("\n") == 1
    assert text.endswith("<0>b\n")
    assert text[:-1].isprintable()
    assert "a\\" in text


def test_an_exceptions_words_stay_in_their_line() -> None:
    try:
        raise ValueError("one\n2026-11-27T00:00:00+0000 error two\x1b\n")
    except ValueError:
        text = logged(journald=False, text="went wrong", failure=Failure())
    assert text.splitlines()[-1] == (
        "builtins.ValueError: one\\n2026-11-27T00:00:00+0000 error two\\x1b"
    )


def test_an_exception_without_words_is_named() -> None:
    text = logged(journald=False, text="went wrong", failure=Failure(ValueError()))
    assert text.splitlines()[-1].strip() == "Failure: builtins.ValueError:"


def test_an_endless_line_is_cut() -> None:
    text = logged(journald=True, x="x" * (MAX_LINE + 5))
    assert text == f"<6>{'x' * MAX_LINE}... (5 more characters)\n"


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


MESSAGES = """
import sys
from twisted.logger import Logger
from sharded_milter.ops import logs
assert logs.message_log() is None
logs.begin(sys.argv[1], {name: "1" for name in sys.argv[2:]})
write = logs.message_log()
if write is None:
    print("none")
else:
    write("qid=\x1b1 size=2")
    Logger("sharded_milter").info("qid=\x1b1 size=2")
"""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("journal", [[], ["JOURNAL_STREAM"]], ids=["terminal", "journald"])
def test_a_line_about_a_message_is_as_any_other_info_line(level: str, journal: list[str]) -> None:
    command = [sys.executable, "-c", MESSAGES, level, *journal]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if level in ("debug", "info"):
        stamped = 0 if journal else len("2026-01-01T00:00:00+0000")
        first, second = (line[stamped:] for line in done.stderr.splitlines())
        assert first == second
        assert first.endswith("qid=\\x1b1 size=2")
    else:
        assert (done.stderr, done.stdout) == ("", "none\n")


def program(source: str, stderr: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run a program whose log has begun."""
    begun = "import sys; from sharded_milter.ops import logs; logs.begin('info', {})\n"
    return subprocess.run(
        [sys.executable, "-c", begun + source],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_crash_shows_its_traceback_behind_what_was_logged() -> None:
    done = program(
        "from twisted.logger import Logger; Logger('sharded_milter.x').info('before')\n"
        "raise ValueError('one\\n\\x1btwo')"
    )
    first, second, *_, words, last = done.stderr.splitlines()
    assert first.endswith(" before")
    assert (second, words, last) == (
        "Traceback (most recent call last):",
        "ValueError: one",
        r"\x1btwo",
    )


def test_what_is_printed_to_standard_error_goes_the_same_way() -> None:
    done = program(
        "print('a', 'b\\x1b', file=sys.stderr); sys.stderr.write('no end'); sys.stderr.flush()\n"
        "there = sys.stderr\n"
        "print(there.fileno(), there.isatty(), there.writable(), there.encoding)"
    )
    assert done.stderr == "a b\\x1b\nno end\n"
    assert done.stdout == "2 False True utf-8\n"


def test_a_line_without_end_is_not_kept_for_ever() -> None:
    done = program(f"sys.stderr.write('x' * {MAX_LINE}); sys.stderr.write('y'); print(1)")
    assert done.stderr.strip() == "x" * MAX_LINE + "y"


def test_the_program_ends_though_nobody_reads() -> None:
    reader, writer = os.pipe()
    try:
        done = program("print('x' * 200_000, file=sys.stderr); raise ValueError", writer)
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 1


def test_without_a_standard_error_no_other_file_gets_the_lines(tmp_path: Path) -> None:
    source = (
        "import os, sys; os.close(2); sys.stderr = None\n"
        "from sharded_milter.ops import logs; logs.begin('info', {})\n"
        f"file = open({str(tmp_path / 'other')!r}, 'w')\n"
        "from twisted.logger import Logger; Logger('sharded_milter.x').info('line')\n"
        "print('printed', file=sys.stderr)"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
    assert (tmp_path / "other").read_text() == ""
