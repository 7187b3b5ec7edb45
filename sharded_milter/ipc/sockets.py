"""The sockets between master and workers: write and read immediately.

A Twisted transport writes in the next reactor iteration, which costs two calls of epoll_ctl and
that iteration. These functions write at once what the socket accepts.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable
from typing import Any


def send_now(transport: Any, data: bytes) -> bool:
    """Write `data` at once; leave what the socket does not accept now to the reactor.

    Return whether the socket has accepted all of it. Raise OSError, with nothing sent, if
    descriptors wait and the system does not pass them.
    """
    sent = sent_now(transport, data)
    if sent < len(data):
        transport.write(data[sent:])
        return False
    return True


def sent_now(transport: Any, data: bytes) -> int:
    """Write as much of `data` as the socket accepts now; return the number of bytes.

    Raise OSError as `send_now` does.
    """
    if not has_sent_all(transport):
        return 0
    sent = transport.writeSomeData(data)
    # Else the connection is lost, which the reactor will report.
    return sent if isinstance(sent, int) else 0


def send_rest(transport: Any) -> None:
    """Block until the other end has taken all that waits, or is gone."""
    poll = select.poll()
    poll.register(transport.fileno(), select.POLLOUT)
    while transport.dataBuffer or transport._tempDataBuffer:
        poll.poll()
        if transport.doWrite() is not None:  # the reactor finds that out too
            break


def unsent_bytes(transport: Any) -> int:
    """Return the number of bytes that wait in the transport's buffers."""
    waiting = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
    return int(waiting)


def has_sent_all(transport: Any) -> bool:
    """Return whether the transport is connected and its buffers are empty, descriptors included."""
    return (
        bool(getattr(transport, "connected", False))
        and not transport.disconnecting
        and not getattr(transport, "dataBuffer", True)
        and not getattr(transport, "_tempDataBuffer", True)
    )


def read_now(
    readers: Iterable[Any], most: int, is_paused: Callable[[], bool] = lambda: False
) -> None:
    """Call `doRead` on ready readers, at most `most` times each, until `is_paused` is True."""
    by_descriptor = {reader.fileno(): reader for reader in readers}
    poll = select.poll()  # mostly nothing is ready, which costs one call
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    for _ in range(most):
        ready = poll.poll(0)
        if not ready:
            break
        for descriptor, _ in ready:
            if is_paused():
                return
            if by_descriptor[descriptor].doRead() is not None:  # the connection is lost
                poll.unregister(descriptor)
