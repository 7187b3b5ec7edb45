"""Sending at once: a Twisted transport writes in the reactor's next turn, which costs two calls of
epoll_ctl and that turn; what can leave now leaves now.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.abstract import FileDescriptor


def send_now(transport: Any, data: bytes) -> None:
    """Writes all of `data`; what the socket does not take now leaves as it always would."""
    if _is_still(transport):
        sent = transport.writeSomeData(data)
        if isinstance(sent, int):  # else the connection is lost, which the reactor finds out too
            if sent == len(data):
                return
            data = data[sent:]
    transport.write(data)


def _is_still(transport: Any) -> bool:
    """Whether nothing waits to be written, so that nothing would be overtaken."""
    return (
        isinstance(transport, FileDescriptor)
        and bool(transport.connected)
        and not transport.disconnecting
        and not transport.dataBuffer
        and not getattr(transport, "_tempDataBuffer", True)
    )


class SendsAtOnce:
    """Mixed into an AMP protocol: its boxes leave at once."""

    transport: Any

    def sendBox(self, box: Any) -> None:
        """Sends one box."""
        send_now(self.transport, box.serialize())
