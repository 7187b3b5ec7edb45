"""Coroutines of authors: they may await what asyncio awaits and what Twisted awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any

from twisted.internet.defer import Deferred

from ..errors import CallbackFailed


class _Bridge:
    """Drives an awaitable inside an asyncio task; Deferreds it waits for become futures."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._awaitable.__await__()
        send, value = steps.send, None
        while True:
            try:
                waiting_for = send(value)
            except StopIteration as stop:
                return stop.value
            try:
                if isinstance(waiting_for, Deferred):
                    future = waiting_for.asFuture(asyncio.get_running_loop())
                    value = yield from future.__await__()
                else:
                    value = yield waiting_for
                send = steps.send
            except BaseException as error:  # the author's own try must see it
                send, value = steps.throw, error


async def bridged(awaitable: Awaitable[Any]) -> Any:
    """The result of `awaitable`, awaited in the running asyncio task.

    Raises what it raises, but CallbackFailed for an exit: asyncio would end its loop on that,
    and with it the worker.
    """
    try:
        return await _Bridge(awaitable)
    except (SystemExit, KeyboardInterrupt) as error:
        raise CallbackFailed(f"the callback raised {error!r}") from error
