"""Run code that may have to wait, without a coroutine if it does not.

The code is a generator that yields each awaitable. If it yields none, it runs to its end like a
plain function.
"""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[Awaitable[Any], Any, T]


def run(steps: Steps[T]) -> T | Awaitable[T]:
    """Return the result of the generator, or an awaitable of it; raise its exception."""
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
            except BaseException as error:  # the generator may handle it
                waiting_for = steps.throw(error)
            else:
                waiting_for = steps.send(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
