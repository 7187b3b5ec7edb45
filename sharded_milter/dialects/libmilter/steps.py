"""Callbacks that may be coroutines, written once: a generator that yields what must be awaited.

As long as nothing is yielded it runs to its end as a plain function would, without a coroutine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[Awaitable[Any], Any, T]


def run(steps: Steps[T]) -> T | Awaitable[T]:
    """What the generator returns, or an awaitable of it; raises what it raises."""
    try:
        waiting_for = next(steps)
    except StopIteration as stop:
        result: T = stop.value
        return result
    return _later(steps, waiting_for)


async def _later(steps: Steps[T], waiting_for: Awaitable[Any]) -> T:
    while True:
        try:
            try:
                value = await waiting_for
            except BaseException as error:  # the generator's own try must see it
                waiting_for = steps.throw(error)
            else:
                waiting_for = steps.send(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
