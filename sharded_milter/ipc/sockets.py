"""The sockets between master and workers: sending and reading at once.

A Twisted transport writes in the reactor's next turn, which costs two calls of epoll_ctl and that
turn; what can leave now leaves now.
"""

from __future__ import annotations

import select
from collections.abc import Iterable
from typing import Any


def send_now(transport: Any, data: bytes) -> bool:
    """Writes all of `data`; what the socket does not take now leaves as it always would.

    Returns whether all of it has left.
    """
    sent = sent_now(transport, data)
    if sent < len(data):
        transport.write(data[sent:])
        return False
    return True


def sent_now(transport: Any, data: bytes) -> int:
    """Writes what the socket takes now of `data`; returns how many bytes that were."""
    if not is_still(transport):
        return 0
    sent = transport.writeSomeData(data)
    # Else the connection is lost, which the reactor finds out too.
    return sent if isinstance(sent, int) else 0


def unsent(transport: Any) -> int:
    """The bytes that the other end has not made room for."""
    waiting = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
    return int(waiting)


def is_still(transport: Any) -> bool:
    """Whether nothing waits to be written: nothing would be overtaken, descriptors included."""
    return (
        bool(getattr(transport, "connected", False))
        and not transport.disconnecting
        and not getattr(transport, "dataBuffer", True)
        and not getattr(transport, "_tempDataBuffer", True)
    )


def read_now(readers: Iterable[Any], most: int) -> None:
    """Has Twisted's readers take what has arrived for them, in so many reads of each at most."""
    by_descriptor = {reader.fileno(): reader for reader in readers}
    poll = select.poll()  # one call says that there is nothing, as there is most of the time
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    for _ in range(most):
        said = poll.poll(0)
        if not said:
            break
        for descriptor, _ in said:
            if by_descriptor[descriptor].doRead() is not None:  # that was its end
                poll.unregister(descriptor)
