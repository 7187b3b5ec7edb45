"""Steps: plain calls stay plain, and awaitables are awaited in order."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest
from watched import Turn, awaited

from sharded_milter.dialects.libmilter.steps import Steps, run


class Fails:
    """An awaitable that raises."""

    def __await__(self) -> Any:
        yield
        raise ZeroDivisionError("awaited")


async def value_later(value: bytes) -> bytes:
    await Turn()
    return value


def steps(*waiting: Awaitable[bytes], log: list[Any]) -> Steps[bytes]:
    for awaitable in waiting:
        try:
            log.append((yield awaitable))
        except ZeroDivisionError as error:
            log.append(str(error))
    return b"end"


def test_what_waits_for_nothing_returns_its_value_itself() -> None:
    assert run(steps(log=[])) == b"end"


def test_what_waits_for_nothing_raises_at_once() -> None:
    def broken() -> Steps[bytes]:
        yield from ()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(broken())


def test_what_must_be_awaited_is_awaited_in_order() -> None:
    log: list[Any] = []
    later = run(steps(value_later(b"1"), value_later(b"2"), log=log))
    assert log == []
    assert awaited(later) == b"end"
    assert log == [b"1", b"2"]


def test_what_an_awaitable_raises_is_raised_where_it_was_yielded() -> None:
    log: list[Any] = []
    later = run(steps(Fails(), value_later(b"2"), Fails(), log=log))
    assert awaited(later) == b"end"
    assert log == ["awaited", b"2", "awaited"]


def test_what_is_raised_between_two_awaits_is_raised_by_the_whole() -> None:
    def broken() -> Steps[bytes]:
        yield value_later(b"1")
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        awaited(run(broken()))


def test_what_nobody_catches_is_raised_by_the_whole() -> None:
    def careless() -> Steps[bytes]:
        value: bytes = yield Fails()
        return value

    with pytest.raises(ZeroDivisionError, match="awaited"):
        awaited(run(careless()))


def test_cancelling_is_heard_inside() -> None:
    heard: list[str] = []

    def patient() -> Steps[bytes]:
        try:
            yield value_later(b"1")
        finally:
            heard.append("cleaned up")
        raise AssertionError("never")

    later: Any = run(patient())
    later.send(None)
    later.close()
    assert heard == ["cleaned up"]


def test_a_stop_iteration_of_an_author_is_no_value() -> None:
    def careless() -> Steps[bytes]:
        yield from ()
        raise StopIteration(b"not this")

    with pytest.raises(RuntimeError, match="generator raised StopIteration"):
        run(careless())
