"""Authors' coroutines: they may await asyncio's awaitables and Twisted's Deferreds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from twisted.internet.defer import Deferred

from sharded_milter.errors import CallbackFailed

# Makes a step of a coroutine: calls its `send` or `throw` with the value to send or throw.
Step = Callable[[Callable[[Any], Any], Any], Any]


def plain_step(send: Callable[[Any], Any], value: Any) -> Any:
    """Make a step and do nothing else."""
    return send(value)


class _Stepped:
    """An awaitable whose steps are made by `step`.

    Inside an asyncio task it waits for the Deferreds that the coroutine awaits.
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
            except GeneratorExit:  # this awaitable is closed
                steps.close()
                raise
            except BaseException as error:  # the author's own `try` must catch it
                send, value = steps.throw, error


def _fired(deferred: Deferred[Any]) -> asyncio.Future[None]:
    """Return a future that is done when the Deferred has fired.

    The result stays in the Deferred, where the coroutine reads it; `asFuture` would remove it.
    Cancelling the future cancels the Deferred.
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


def drive(awaitable: Awaitable[Any], step: Step = plain_step) -> Deferred[Any]:
    """Run the awaitable; return a Deferred of its result.

    It may await asyncio's awaitables if the reactor runs on asyncio.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return Deferred.fromCoroutine(_awaited(awaitable, step))
    return Deferred.fromFuture(loop.create_task(bridge(awaitable, step)))


async def _awaited(awaitable: Awaitable[Any], step: Step) -> Any:
    return await _Stepped(awaitable, step, in_asyncio=False)


async def bridge(awaitable: Awaitable[Any], step: Step = plain_step) -> Any:
    """Await `awaitable` in the running asyncio task, and return its result.

    Raise what it raises, but CallbackFailed instead of SystemExit or KeyboardInterrupt: these would
    end asyncio's loop, and the worker.
    """
    try:
        return await _Stepped(awaitable, step, in_asyncio=True)
    except (SystemExit, KeyboardInterrupt) as error:
        raise CallbackFailed(f"the callback raised {error!r}") from error
