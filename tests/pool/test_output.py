"""What a worker writes, up to the limits of a second and beyond them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from sharded_milter.pool.output import MAX_BYTES, MAX_LINES, MAX_LOG_LINE, MAX_READ, SECOND, Output


class Worker:
    """One worker's output, and what its shard hears of it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.lines: list[bytes] = []
        self.dropped: list[tuple[int, int]] = []
        self.holds: list[bool] = []
        self.stdout = Output(self, self.holds.append, self.clock)

    def output(self, line: bytes) -> None:
        self.lines.append(line)

    def output_dropped(self, lines: int, size: int) -> None:
        self.dropped.append((lines, size))

    def exited(self, reason: str) -> None: ...

    def write(self, data: bytes, stream: int = 1) -> None:
        self.stdout.feed(stream, data)


def test_an_endless_line_is_shown_up_to_its_limit() -> None:
    worker = Worker()
    worker.write(b"x" * (MAX_LOG_LINE + 1))
    worker.write(b"y" * 100)
    worker.write(b"other\n", stream=2)
    worker.write(b"z\nnext\n")
    assert worker.lines == [b"x" * MAX_LOG_LINE, b"other", b"next"]
    worker.clock.advance(SECOND)
    assert worker.dropped == [(0, 1 + 100 + 1)]


def test_a_long_line_is_shown_up_to_its_limit() -> None:
    worker = Worker()
    worker.write(b"x" * (MAX_LOG_LINE + 5) + b"\ny\n")
    assert worker.lines == [b"x" * MAX_LOG_LINE, b"y"]
    worker.clock.advance(SECOND)
    assert worker.dropped == [(0, 5)]


def test_more_lines_than_a_second_has_are_dropped_and_counted_once() -> None:
    worker = Worker()
    worker.write(b"a\n" * (MAX_LINES - 1))
    worker.write(b"a\nb\nb\n")
    worker.write(b"b\nbegun")
    assert worker.lines == [b"a"] * MAX_LINES
    worker.clock.advance(SECOND)
    assert worker.dropped == [(3, 6)]
    worker.write(b" and ended\n")
    assert worker.lines[MAX_LINES:] == [b"begun and ended"]
    worker.clock.advance(10)
    assert worker.dropped == [(3, 6)]


def test_more_bytes_than_a_second_has_are_dropped_and_counted() -> None:
    worker = Worker()
    line = b"x" * 8000 + b"\n"
    for _ in range(MAX_BYTES // len(line) + 2):
        worker.write(line)
    assert len(worker.lines) == MAX_BYTES // len(line)
    worker.write(b"short\n")
    assert worker.lines[-1] == b"short"
    worker.clock.advance(SECOND)
    assert worker.dropped == [(2, 2 * len(line))]


def test_each_second_has_its_own_limits() -> None:
    worker = Worker()
    for _ in range(3):
        worker.write(b"a\n" * MAX_LINES)
        worker.clock.advance(SECOND)
    assert len(worker.lines) == 3 * MAX_LINES
    assert worker.dropped == []
    assert not worker.clock.getDelayedCalls()


def test_a_worker_that_writes_for_ever_is_held_until_the_second_is_over() -> None:
    worker = Worker()
    worker.clock.advance(SECOND / 2)
    worker.write(b"\n" * MAX_READ)
    assert worker.holds == []
    worker.write(b"\n")
    assert (worker.holds, worker.stdout.held) == ([True], True)
    worker.write(b"\n")  # that was on its way
    assert worker.holds == [True]
    worker.clock.advance(SECOND / 2)
    assert (worker.holds, worker.stdout.held) == ([True, False], False)
    assert worker.dropped == [(MAX_READ + 2 - MAX_LINES,) * 2]


def test_the_end_says_what_is_begun_and_what_is_dropped() -> None:
    worker = Worker()
    worker.write(b"x" * (MAX_LOG_LINE + 1))
    worker.write(b"Fatal", stream=2)
    worker.stdout.end()
    assert worker.lines == [b"x" * MAX_LOG_LINE, b"Fatal"]
    assert worker.dropped == [(0, 1)]
    assert not worker.clock.getDelayedCalls()
    worker.write(b"a descendant's\n", stream=2)
    assert worker.lines[2:] == [b"a descendant's"]


def test_a_last_word_too_many_is_counted() -> None:
    worker = Worker()
    worker.write(b"a\n" * MAX_LINES + b"Fatal")
    worker.stdout.end()
    assert len(worker.lines) == MAX_LINES


@given(st.lists(st.tuples(st.integers(1, 2), st.text("ab\n", max_size=30)), max_size=30))
def test_within_the_limits_pieces_are_put_together_again(
    pieces: list[tuple[int, str]],
) -> None:
    worker = Worker()
    for stream, piece in pieces:
        worker.write(piece.encode(), stream)
        worker.clock.advance(SECOND)
    worker.stdout.end()
    said = {
        stream: "".join(piece for where, piece in pieces if where == stream) for stream in (1, 2)
    }
    lines = [line.encode() for text in said.values() for line in text.split("\n")[:-1]]
    rests = [text.split("\n")[-1].encode() for text in said.values()]
    assert sorted(worker.lines) == sorted(lines + [rest for rest in rests if rest])
    assert worker.dropped == []
