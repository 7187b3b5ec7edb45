"""Guards against children that a milter forks and that continue as if they were their parent.

A child has a copy of everything: the connection to the master, the reactor, whose epoll it shares
with the parent, and the call stack, on which it would return from the callback into our code. So it
closes what belongs to the parent, and exits where the milter's code returns.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from threading import get_ident
from typing import Any, NoReturn

# RLIMIT_LOCKS, which has no name in Python and which Linux does not enforce. A worker's value is a
# mark, by which the master finds its descendants.
MARKED_LIMIT = 10

Handler = Callable[[int, Any], object]


def guarded(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a milter's code and return its result; exit in a forked child that returns from it.

    The child's exit code is the one that Python's main program would have.
    """
    process = os.getpid()
    try:
        result = call(*arguments)
    except BaseException as error:
        if os.getpid() != process:
            end(error)
        raise
    if os.getpid() != process:
        end()
    return result


def end(error: BaseException | None = None) -> NoReturn:
    """Exit a child at once, with the exit code for `error`; no exit handlers run."""
    code = 0
    try:
        if isinstance(error, SystemExit):
            code = _exit_code(error.code)
        elif error is not None and not isinstance(error, StopIteration):  # a coroutine's return
            code = 1
            traceback.print_exception(error)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def run_in_children(call: Callable[[], object]) -> None:
    """Call `call` in each child that Python forks from now on, before anything else."""
    os.register_at_fork(after_in_child=call)


def handle_in_parent_only(numbers: Collection[int], handler: Handler) -> None:
    """Set the handler of signals; forked and executed processes get their default action.

    The signals do not interrupt system calls of C code.
    """
    for number in numbers:
        signal.signal(number, handler)
        signal.siginterrupt(number, False)

    masks: dict[int, set[int]] = {}  # of threads that fork

    def block() -> None:
        masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop(get_ident()))

    def reset() -> None:
        for number in numbers:
            if signal.getsignal(number) is handler:  # the milter has not set its own
                signal.signal(number, signal.SIG_DFL)
        with suppress(ValueError):  # a child's signals must not wake the parent's loop
            signal.set_wakeup_fd(-1)
        unblock()

    # Blocked, so that a signal waits until the child has reset its handlers.
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


def install_asyncio_reactor() -> None:
    """Install Twisted's asyncio reactor; a forked child that returns to its loop exits."""
    import asyncio  # here, because the master and a script's worker do not need it
    import selectors

    from twisted.internet import asyncioreactor

    selector = selectors.DefaultSelector()
    loop = asyncio.SelectorEventLoop(selector)
    asyncio.set_event_loop(loop)
    asyncioreactor.install(loop)

    def stop_loop() -> None:
        selector.select = lambda timeout=None: end()  # type: ignore[method-assign]

    run_in_children(stop_loop)


def guard_loop_of(reactor: Any) -> None:
    """Make a forked child exit when it returns to the loop of a reactor without asyncio."""

    def stop_loop() -> None:
        reactor.doIteration = lambda delay: end()

    run_in_children(stop_loop)
