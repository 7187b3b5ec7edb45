"""Coroutines of authors: they may await what asyncio awaits and what Twisted awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from twisted.internet.defer import Deferred

from sharded_milter.errors import CallbackFailed

# How a step of a coroutine is made: with its `send` or `throw`, and what is sent or thrown.
Step = Callable[[Callable[[Any], Any], Any], Any]


def plain_step(send: Callable[[Any], Any], value: Any) -> Any:
    """Just makes it."""
    return send(value)


class _Stepped:
    """An awaitable whose steps are made by `step`.

    Inside an asyncio task it waits for Deferreds in the task's place.
    """

    def __init__(self, awaitable: Awaitable[Any], step: Step, *, in_asyncio: bool) -> None:
        self._awaitable = awaitable
        self._step = step
        self._in_asyncio = in_asyncio

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._awaitable.__await__()
        send, value = steps.send, None
        while True:
            try:
                waiting_for = self._step(send, value)
            except StopIteration as stop:
                return stop.value
            try:
                if self._in_asyncio and isinstance(waiting_for, Deferred):
                    yield from _fired(waiting_for).__await__()
                    value = None
                else:
                    value = yield waiting_for
                send = steps.send
            except GeneratorExit:  # whoever awaits it is gone
                steps.close()
                raise
            except BaseException as error:  # the author's own try must see it
                send, value = steps.throw, error


def _fired(deferred: Deferred[Any]) -> asyncio.Future[None]:
    """Done when the Deferred has fired; the result stays there, where its awaiter looks for it.

    (`asFuture` would take it away.) Cancelling the future cancels the Deferred.
    """
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fire(result: Any) -> Any:
        if not future.done():
            future.set_result(None)
        return result

    def check_cancelled(future: asyncio.Future[None]) -> None:
        if future.cancelled():
            deferred.addErrback(lambda _: None)
            deferred.cancel()

    deferred.addBoth(fire)
    future.add_done_callback(check_cancelled)
    return future


def driven(awaitable: Awaitable[Any], step: Step = plain_step) -> Deferred[Any]:
    """Fires with its result. Where the reactor runs on asyncio it may await what asyncio does."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return Deferred.fromCoroutine(_awaited(awaitable, step))
    return Deferred.fromFuture(loop.create_task(bridged(awaitable, step)))


async def _awaited(awaitable: Awaitable[Any], step: Step) -> Any:
    return await _Stepped(awaitable, step, in_asyncio=False)


async def bridged(awaitable: Awaitable[Any], step: Step = plain_step) -> Any:
    """The result of `awaitable`, awaited in the running asyncio task.

    Raises what it raises, but CallbackFailed for an exit: asyncio would end its loop on that,
    and with it the worker.
    """
    try:
        return await _Stepped(awaitable, step, in_asyncio=True)
    except (SystemExit, KeyboardInterrupt) as error:
        raise CallbackFailed(f"the callback raised {error!r}") from error
