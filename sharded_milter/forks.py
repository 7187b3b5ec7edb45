"""What a child must not do that a milter forks: go on as the process from which it was forked.

A child has a copy of all that its parent has: the connection to the master, the reactor, whose
epoll it even shares, and the milter's caller, to which it returns when it falls out of a callback.
So it gives up what is not its own, and ends where the milter's code ends.
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

# RLIMIT_LOCKS, which Python has no name for: a limit that nothing is checked against. A worker's is
# a number by which the master knows all that descends from it.
MARKED_LIMIT = 10

Handler = Callable[[int, Any], object]


def guarded(call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a milter's code; a child that it has forked, and which comes back, ends here.

    Such a child's exit code is what Python's would be at the end of its main program.
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
    """Ends a child at once, with the exit code that `error` stands for: nothing else is run."""
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
    """Has `call` called in each child that Python forks from now on, before anything else."""
    os.register_at_fork(after_in_child=call)


def handle_in_parent_only(numbers: Collection[int], handler: Handler) -> None:
    """Sets the handler of signals; what is forked or executed has their default action.

    System calls of C code are not interrupted by them.
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
            if signal.getsignal(number) is handler:  # else the milter has set its own
                signal.signal(number, signal.SIG_DFL)
        with suppress(ValueError):  # the parent's loop is not woken by a child's signals
            signal.set_wakeup_fd(-1)
        unblock()

    # A signal that comes before the child has reset its handlers waits until then.
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


def install_asyncio_reactor() -> None:
    """Installs Twisted's reactor on asyncio; a child that comes back to its loop ends."""
    import asyncio  # here, because the master and a script's worker do without
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
    """A child that comes back to the loop of a reactor which has its own ends."""

    def stop_loop() -> None:
        reactor.doIteration = lambda delay: end()

    run_in_children(stop_loop)
