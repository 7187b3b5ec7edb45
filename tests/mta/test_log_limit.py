"""Log lines that a peer can cause as often as it likes."""

from __future__ import annotations

from twisted.internet.task import Clock

from sharded_milter.mta.log_limit import INTERVAL, MAX_TOPICS, LimitedLog


class Log:
    """The lines that were written, and the clock."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.clock = Clock()
        self.limited = LimitedLog(lambda _, line: self.lines.append(line), self.clock.seconds)


def test_the_first_line_is_written_and_the_next_ones_are_counted() -> None:
    log = Log()
    for number in range(4):
        log.limited.write("a", f"line {number}")
    assert log.lines == ["line 0"]
    log.clock.advance(INTERVAL)
    log.limited.write("a", "line 4")
    log.clock.advance(INTERVAL)
    log.limited.write("a", "line 5")
    assert log.lines[1:] == ["line 4 (3 more such lines were left out)", "line 5"]


def test_each_thing_has_its_own_line() -> None:
    log = Log()
    for about in "abab":
        log.limited.write(about, about)
    assert log.lines == ["a", "b"]


def test_things_without_end_are_neither_said_nor_kept_without_end() -> None:
    log = Log()
    for number in range(3 * MAX_TOPICS):
        log.limited.write(number, "x")
    assert len(log.lines) == MAX_TOPICS + 1
    log.clock.advance(INTERVAL)
    log.limited.write("another", "y")
    assert log.lines[-1] == "y"
    assert len(log.limited._written) == 1


def test_what_was_left_out_of_a_thing_long_ago_is_forgotten_with_it() -> None:
    log = Log()
    for number in (*range(MAX_TOPICS), 0):
        log.limited.write(number, "x")
    log.clock.advance(INTERVAL)
    log.limited.write("another", "y")
    assert log.limited._left_out == {}
