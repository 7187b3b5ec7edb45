"""One MTA connection: the socket of a conversation.

The MTA gets one answer to each command that it waits for, in order; the socket is never closed
instead of an answer. Commands that arrive while the milters are asked are queued, except ABORT and
QUIT, which cancel the jobs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from twisted.internet import interfaces
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from sharded_milter.alarms import Alarm, DelayedCall
from sharded_milter.dispatch.policy import NO_ROOM
from sharded_milter.errors import RemoteProtocolError
from sharded_milter.mta.conversation import SMALL_PART, Conversation, ConversationContext
from sharded_milter.mta.inflight import Claim
from sharded_milter.mta.outbox import Outbox
from sharded_milter.mta.stream_transport import StreamTransport, is_socket
from sharded_milter.protocol.commands import Abort, Quit, QuitNc
from sharded_milter.protocol.replies import Progress
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import Framer

# Bytes of one read: Twisted's default, and the buffer of a UNIX socket. Large reads are for large
# messages only, because allocating the buffer takes longer than a small message.
SMALL_READ = 65_536
LARGE_READ = 262_144

# Seconds in which an MTA must read more of its unread answers, or the end of a closed connection.
# Postfix and Sendmail read at once. Without a limit, a peer that does not read would hold its
# answers, and one of `max_connections`, for ever. A refused connection has this time in all.
CLOSE_GRACE = 30.0

# Unread bytes of answers above which no more commands of the MTA are read.
MAX_UNREAD = 65_536

# Seconds of one reactor iteration for the commands of one MTA.
MAX_BUSY = 0.003

# Bytes that are counted for a connection itself while it has commands, answers or a message: about
# thirty objects of ours and Twisted's, and its job. Idle connections are limited in number only.
CONNECTION_COST = 10_240

_PROGRESS = Progress().encode()
_CANCELLING = frozenset(kind.letter[0] for kind in (Abort, Quit, QuitNc))


class ConnectionContext(ConversationContext, Protocol):
    """The state that all MTA connections of a service share, as a connection uses it."""

    idle: Alarm[MilterConnection]  # calls `idle_timed_out`
    closing: Alarm[MilterConnection]  # calls `unread_timed_out` after CLOSE_GRACE
    progress: Alarm[MilterConnection]  # calls `send_progress`

    def connected(self, connection: MilterConnection) -> bytes: ...
    def disconnected(self, connection: MilterConnection) -> None: ...


@implementer(interfaces.IPushProducer)
class MilterConnection(TwistedProtocol):
    """The connection of one MTA, over which it is served with the milter protocol."""

    log = Logger()
    transport: StreamTransport  # type: ignore[assignment]  # Twisted declares ITransport | None

    def __init__(self, context: ConnectionContext) -> None:
        self._context = context
        self._conversation = Conversation(context)
        self._framer = Framer()
        self._scanned = 0  # up to this offset in the framer's buffer there is no ABORT or QUIT
        self._claim = Claim(context.inflight)
        self._congested = False  # the transport is no socket and its buffer is full
        self._paused = False
        self._resume_call: DelayedCall | None = None  # in the next reactor iteration
        self._quick_ack: Callable[[], None] | None = None

    # Called by Twisted

    def connectionMade(self) -> None:
        transport = self.transport
        self._outbox = Outbox(transport, self._unread_changed)
        on_tcp = isinstance(transport.getHost(), IPv4Address | IPv6Address)
        if on_tcp and interfaces.ITCPTransport.providedBy(transport):
            transport.setTcpNoDelay(True)
            self._quick_ack = _quick_ack_setter(transport)
        if not is_socket(transport):
            transport.registerProducer(self, True)
        self._context.idle.set(self)
        refusal = self._context.connected(self)
        if refusal:
            self._conversation.refuse(refusal)
            self._context.closing.set(self)

    def dataReceived(self, data: bytes) -> None:
        if self._conversation.is_over:  # ignore all that still arrives
            return
        self._framer.feed(data)
        self._process_received()
        large = len(data) >= SMALL_READ and self._resume_call is None
        self.transport.bufferSize = LARGE_READ if large else SMALL_READ

    def fill(self, receive: Callable[[memoryview], int]) -> int:
        """Receive bytes, from a transport of our own; return their number."""
        return self._framer.fill(receive)

    def filled(self) -> None:
        """Process the bytes that were received."""
        if self._conversation.is_over:
            self._framer = Framer()  # ignore all that still arrives
        else:
            self._process_received()

    def _process_received(self) -> None:
        self._context.idle.set(self)
        if self._quick_ack is not None:
            self._quick_ack()
        self._process()

    @property
    def has_negotiated(self) -> bool:
        """True once the MTA has sent its offer, the first packet."""
        return self._conversation.has_negotiated

    @property
    def refusal_sent(self) -> bool:
        """True once the reply that refuses the connection was sent."""
        return self._conversation.refusal_sent

    def _cancel_if_aborted(self) -> None:
        """Cancel the jobs if ABORT or QUIT is queued behind their command."""
        for letter, end in self._framer.peek(max(self._scanned, self._framer.at)):
            self._scanned = end
            if letter in _CANCELLING:
                self._conversation.cancel()
                self._context.progress.stop(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        context = self._context
        for alarm in (context.idle, context.progress, context.closing):
            alarm.stop(self)
        self._drop_commands()
        self._conversation.end()
        self._outbox.stopProducing()
        self._claim.set(0)
        context.disconnected(self)

    # Commands in, answers out

    def _process(self, answer: bytes = b"") -> None:
        """Process commands until milters are asked; write `answer` and theirs together."""
        answers = [answer]
        try:
            self._process_commands(answers)
        except RemoteProtocolError as error:
            self._write(b"".join(answers))
            self._close_after_error(error)
            return
        self._write(b"".join(answers))
        if self._conversation.pending is not None:
            self._start_progress()
        if self._conversation.is_over:
            self._close()
        else:
            self._count_bytes()
            self._adjust_reading()

    def _process_commands(self, answers: list[bytes]) -> None:
        conversation, framer = self._conversation, self._framer
        seconds = self._context.reactor.seconds
        until = seconds() + MAX_BUSY
        while framer.at < framer.end:
            if conversation.pending is not None:
                self._cancel_if_aborted()
            if conversation.pending is not None or conversation.is_over:
                break
            if seconds() > until:
                self._resume_call = self._resume_call or self._context.reactor.callLater(
                    0, self._resume_commands
                )
                break
            answer = conversation.receive(framer)
            if answer is None:
                break
            if isinstance(answer, bytes):
                answers.append(answer)
            else:
                answer.addCallback(self._send_answer).addErrback(self._close_after_defect)
        self._scanned = max(0, self._scanned - framer.at)
        framer.compact()

    def _resume_commands(self) -> None:
        """Go on with queued commands after the other connections were served."""
        self._resume_call = None
        if self._outbox.unread <= MAX_UNREAD:  # else resume when the MTA has read
            self._process()

    def _send_answer(self, answer: bytes) -> None:
        """Write the milters' answer, and go on with queued commands."""
        self._context.progress.stop(self)
        if self._framer.waiting:
            self._process(answer)
        else:
            self._write(answer)
            self._count_bytes()

    def _close_after_defect(self, failure: Failure) -> None:
        """Close the connection after a defect of ours, so that the MTA does not wait in vain."""
        self.log.failure("closing a connection: no verdict because of an internal error", failure)
        self._close()

    def _close_after_error(self, error: RemoteProtocolError) -> None:
        if not self._conversation.is_refused:  # else any peer could fill the log
            self.log.warn("closing a connection: {why}", why=str(error))
        self._close()

    # Timeouts and progress

    def idle_timed_out(self) -> None:
        """Close the connection: the MTA has sent nothing for `idle_timeout`."""
        if self._conversation.pending is not None:  # the MTA waits for the answer
            self._context.idle.set(self)
            return
        self.log.info(
            "closing a connection: it was idle for {n:g} s (--idle-timeout)",
            n=self._context.limits.idle_timeout,
        )
        self.close_unanswered()

    def close_unanswered(self) -> None:
        """Close the connection; no command waits for an answer."""
        if self._outbox.unread or self._congested:  # its answers are not read
            self.abort()
        else:
            self._close()

    def _start_progress(self) -> None:
        """Send PROGRESS at intervals while the milters are asked, if the MTA accepts it."""
        conversation = self._conversation
        early = conversation.pending is not Stage.EOM
        if self not in self._context.progress and (
            not early or conversation.accepts_early_progress
        ):
            self._context.progress.set(self)

    def send_progress(self) -> None:
        """Send PROGRESS, and set the alarm for the next one."""
        self._write(_PROGRESS)
        self._context.progress.set(self)

    # The socket

    def finish(self) -> None:
        """Close the connection because the service stops; answer a pending question first."""
        self._write(self._conversation.end())
        self._close()

    def abort(self) -> None:
        """Close the connection at once; drop unread answers."""
        self.transport.abortConnection()

    def _write(self, data: bytes) -> None:
        if data:
            self._outbox.write(data)

    def _unread_changed(self) -> None:
        """Handle a change of the outbox: the MTA has read bytes, or the first are unread."""
        closing, unread = self._context.closing, self._outbox.unread
        if not self._conversation.is_over and (not unread or self not in closing):
            self._context.idle.set(self)  # a slow reader gets one idle_timeout in all
        if unread:
            if not self._conversation.is_refused or self not in closing:
                closing.set(self)  # a refused connection has CLOSE_GRACE in all
        elif not self._conversation.is_over:
            if not self._conversation.is_refused:
                closing.stop(self)
            if self._framer.waiting and self._resume_call is None:
                self._resume_call = self._context.reactor.callLater(0, self._resume_commands)
        self._count_bytes()
        self._adjust_reading()

    def unread_timed_out(self) -> None:
        """Abort the connection: the MTA has read nothing for CLOSE_GRACE."""
        if self._outbox.unread:
            self.log.warn(
                "closing a connection: the MTA has read nothing for {n:g} s; {unread} bytes wait",
                n=CLOSE_GRACE,
                unread=self._outbox.unread,
            )
        self.abort()

    def _count_bytes(self) -> None:
        """Count the bytes of queued commands, of unread answers, and of the connection itself."""
        size = self._framer.waiting + self._outbox.unread
        if size or self._conversation.transcript.size:
            size += CONNECTION_COST
        if size != self._claim.size:
            self._claim.set(size)

    def pauseProducing(self) -> None:
        """The transport is no socket, and its buffer is full."""
        self._congested = True
        self._context.idle.set(self)
        self._adjust_reading()

    def resumeProducing(self) -> None:
        """The transport is no socket, and its buffer has room again."""
        self._congested = False
        self._context.idle.set(self)
        self._adjust_reading()

    def stopProducing(self) -> None:
        """The connection is lost; Twisted calls connectionLost too."""

    def _adjust_reading(self) -> None:
        """Pause reading while too many bytes wait, and resume it afterwards."""
        if self._conversation.is_over:
            return
        transport = self.transport
        # An incomplete packet does not count: the rest of it must be read.
        waiting = 0 if self._conversation.pending is None else self._framer.waiting
        if waiting > SMALL_PART and not self._context.inflight.has_room(0):
            self._close_without_room()
            return
        too_much = (
            self._resume_call is not None
            or self._congested
            or self._outbox.unread > MAX_UNREAD
            or waiting > self._context.limits.max_waiting
        )
        if too_much and not self._paused:
            transport.pauseProducing()
        elif self._paused and not too_much:
            transport.resumeProducing()
        self._paused = too_much

    def _close_without_room(self) -> None:
        """Close the connection: the MTA sends commands behind a question, and there is no room.

        A real MTA waits for the answer first.
        """
        self.log.warn(
            "closing a connection: commands arrived before the answer, and there is no room for"
            " them (--max-inflight-bytes)"
        )
        self._write(self._conversation.end(NO_ROOM))
        self._close()

    def _drop_commands(self) -> None:
        self._framer = Framer()
        call, self._resume_call = self._resume_call, None
        if call is not None:
            call.cancel()

    def _close(self) -> None:
        self._drop_commands()
        self._context.progress.stop(self)
        self._conversation.end()
        self._count_bytes()
        transport = self.transport
        if transport.disconnecting:
            return
        if not is_socket(transport):
            transport.unregisterProducer()  # else unread bytes would keep it open
        transport.loseConnection()  # Twisted waits until the outbox is empty
        self._context.idle.stop(self)
        self._context.closing.set(self)


def _quick_ack_setter(transport: StreamTransport) -> Callable[[], None] | None:
    """Return a function that makes the kernel acknowledge the next segment at once, if it can.

    It must be called before each segment, because Linux resets the option. Sendmail writes a macro
    packet and its command separately with Nagle's algorithm, so it waits for the acknowledgement,
    which would else be delayed by 40 ms at every stage.
    """
    if not hasattr(socket, "TCP_QUICKACK"):
        return None
    sock = transport.getHandle()
    if not hasattr(sock, "setsockopt"):  # with TLS it is no socket
        return None

    def acknowledge() -> None:
        with suppress(OSError):  # the connection is lost; the reactor reports it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    acknowledge()
    return acknowledge
