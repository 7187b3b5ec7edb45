"""One coroutine may await asyncio's awaitables and Twisted's, and hears what they raise."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, fail, succeed

from sharded_milter.coroutines import bridge
from sharded_milter.errors import CallbackFailed


def run(awaitable: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await bridge(awaitable)

    return asyncio.run(main())


def later(value: Any) -> Deferred[Any]:
    """A Deferred that fires in the next turn of the loop."""
    deferred: Deferred[Any] = Deferred()
    fire = deferred.errback if isinstance(value, Exception) else deferred.callback
    asyncio.get_running_loop().call_soon(fire, value)
    return deferred


def test_a_coroutine_that_waits_for_nothing_just_returns() -> None:
    async def scan() -> int:
        return 5

    assert run(scan()) == 5


def test_asyncio_and_twisted_are_awaited_side_by_side() -> None:
    async def scan() -> list[object]:
        steps: list[object] = [await asyncio.sleep(0, "asyncio"), await later("twisted")]
        steps.append(await succeed("fired"))
        steps.append(await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2)))
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, "future")
        steps.append(await future)
        async with asyncio.timeout(5):
            steps.append(await later("within a timeout"))
        return steps

    wanted = ["asyncio", "twisted", "fired", [1, 2], "future", "within a timeout"]
    assert run(scan()) == wanted


def test_deferreds_are_awaited_at_any_depth() -> None:
    async def inner() -> str:
        return str(await later("deep"))

    async def outer() -> str:
        return await inner()

    assert run(outer()) == "deep"


def test_a_deferred_itself_is_an_awaitable() -> None:
    async def main() -> object:
        return await bridge(later("twisted"))

    assert asyncio.run(main()) == "twisted"


@pytest.mark.parametrize("where", ["asyncio", "later", "at once"])
def test_what_is_raised_while_it_waits_is_raised_at_its_await(where: str) -> None:
    async def broken() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async def scan() -> str:
        waiting: dict[str, Any] = {
            "asyncio": broken,
            "later": lambda: later(ZeroDivisionError()),
            "at once": lambda: fail(ZeroDivisionError()),
        }
        try:
            await waiting[where]()
        except ZeroDivisionError:
            return str(await later("went on"))
        return "heard nothing"

    assert run(scan()) == "went on"


@pytest.mark.parametrize("late", [False, True])
def test_what_the_coroutine_raises_is_passed_on(late: bool) -> None:
    async def scan() -> None:
        if late:
            await later("first")
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(scan())


@pytest.mark.parametrize("exit_", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("late", [False, True])
def test_an_exit_ends_the_callback_and_not_the_loop(exit_: BaseException, late: bool) -> None:
    async def scan() -> None:
        if late:
            await later("first")
        raise exit_

    with pytest.raises(CallbackFailed, match=r"the callback raised (SystemExit|KeyboardInterrupt)"):
        run(scan())


def test_cancelling_reaches_a_deferred_that_is_awaited() -> None:
    cancelled: list[object] = []
    waiting: Deferred[None] = Deferred(cancelled.append)
    heard: list[BaseException] = []

    async def scan() -> None:
        try:
            await waiting
        except BaseException as error:
            heard.append(error)
            raise

    async def main() -> None:
        task = asyncio.ensure_future(bridge(scan()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(cancelled) == 1
    assert [type(error) for error in heard] == [asyncio.CancelledError]
    waiting.addErrback(lambda failure: failure.trap(CancelledError))


def test_a_coroutine_may_survive_its_cancellation() -> None:
    async def scan() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return str(await later("cleaned up"))
        return "not cancelled"

    async def main() -> Any:
        task = asyncio.ensure_future(bridge(scan()))
        await asyncio.sleep(0)
        task.cancel()
        return await task

    assert asyncio.run(main()) == "cleaned up"


def test_awaiting_a_wrong_object_raises_in_the_coroutine() -> None:
    class Nonsense:
        def __await__(self) -> Generator[Any, Any, Any]:
            yield "nonsense"

    async def scan() -> None:
        await Nonsense()

    with pytest.raises(RuntimeError, match="Task got bad yield: 'nonsense'"):
        run(scan())
