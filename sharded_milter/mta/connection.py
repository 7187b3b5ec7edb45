"""One MTA connection: the socket's side of a conversation.

The law: the MTA gets one answer to each command that waits for one, in order, and no closed
socket instead of an answer. Commands that come while a job is out wait, except those that say
that nobody wants its answer any more.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet import interfaces
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from sharded_milter.alarms import Alarm
from sharded_milter.dispatch.policy import NO_ROOM
from sharded_milter.errors import RemoteProtocolError
from sharded_milter.mta import conversation
from sharded_milter.mta.conversation import SMALL_PART, Conversation
from sharded_milter.mta.inflight import Claim
from sharded_milter.mta.outbox import Outbox, is_socket
from sharded_milter.protocol.commands import Abort, Quit, QuitNc
from sharded_milter.protocol.replies import Progress
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import Framer

# Bytes that are read at a time: Twisted's own number, and what a UNIX socket holds. Large pieces
# are for large messages; asking for one costs more than a small message is long.
SMALL_READ = 65_536
LARGE_READ = 262_144

# Seconds that an MTA gets to take anything more of what it was answered, or the end of a connection
# that we have closed. Postfix and Sendmail read at once; whoever does not would keep its answers,
# and a connection of `max_connections`, for ever. A connection that is turned away has as long in
# all, if no other waits for its place.
CLOSE_GRACE = 30.0

# Bytes of answers that an MTA may leave unread before it is not read either.
MAX_UNREAD = 65_536

# Seconds of one turn of the reactor that one MTA may take, however many small commands it sends.
TURN = 0.003

# What a connection takes besides while it has anything in hand, in bytes: some thirty objects of
# ours and of Twisted's, and its job. One that has nothing is bounded by `max_connections`.
CONNECTION_COST = 10_240

_PROGRESS = Progress().encode()
_LEAVING = frozenset(kind.letter[0] for kind in (Abort, Quit, QuitNc))


class Context(conversation.Context, Protocol):
    """What a connection needs of the service it belongs to."""

    idle: Alarm[MilterConnection]  # rings `timed_out`
    closing: Alarm[MilterConnection]  # rings `give_up_unread` after CLOSE_GRACE
    progress: Alarm[MilterConnection]  # rings `send_progress`

    def connected(self, connection: MilterConnection) -> bytes: ...
    def disconnected(self, connection: MilterConnection) -> None: ...


@implementer(interfaces.IPushProducer)
class MilterConnection(TwistedProtocol):
    """Speaks the milter protocol with one MTA."""

    log = Logger()

    def __init__(self, context: Context) -> None:
        self._context = context
        self._conversation = Conversation(context)
        self._framer = Framer()
        self._looked = 0  # up to here in the framer's buffer nobody leaves
        self._claim = Claim(context.inflight)
        self._congested = False  # a transport that is no socket has too much
        self._paused = False
        self._turn: Any = None  # the call that goes on with commands that wait, in the next turn
        self._quick_ack: Callable[[], None] | None = None

    # What Twisted calls

    def connectionMade(self) -> None:
        transport: Any = self.transport
        self._outbox = Outbox(transport, self._read)
        on_tcp = isinstance(transport.getHost(), IPv4Address | IPv6Address)
        if on_tcp and interfaces.ITCPTransport.providedBy(transport):
            transport.setTcpNoDelay(True)
            self._quick_ack = _quick_ack_of(transport)
        if not is_socket(transport):
            transport.registerProducer(self, True)
        self._context.idle.set(self)
        refusal = self._context.connected(self)
        if refusal:
            self._conversation.turn_away(refusal)
            self._context.closing.set(self)

    def dataReceived(self, data: bytes) -> None:
        if self._conversation.is_over:  # nothing is taken any more
            return
        self._context.idle.set(self)
        if self._quick_ack is not None:
            self._quick_ack()
        self._framer.feed(data)
        self._advance()
        large = len(data) >= SMALL_READ and self._turn is None
        transport: Any = self.transport
        transport.bufferSize = LARGE_READ if large else SMALL_READ

    @property
    def has_greeted(self) -> bool:
        """Whether the MTA has said anything: the first packet is its offer."""
        return self._conversation.has_agreed

    @property
    def has_heard(self) -> bool:
        """Whether the MTA knows that it is turned away."""
        return self._conversation.has_heard

    def _cancel_if_leaving(self) -> None:
        """Cancels the job that is out if ABORT or QUIT is queued behind its command."""
        for letter, end in self._framer.peek(max(self._looked, self._framer.at)):
            self._looked = end
            if letter in _LEAVING:
                self._conversation.cancel()
                self._context.progress.stop(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        context = self._context
        for alarm in (context.idle, context.progress, context.closing):
            alarm.stop(self)
        self._forget_commands()
        self._conversation.end()
        self._outbox.stopProducing()
        self._claim.set(0)
        context.disconnected(self)

    # Commands in, answers out

    def _advance(self, answer: bytes = b"") -> None:
        """Takes commands until milters are asked; writes `answer` and then theirs at once."""
        answers = [answer]
        try:
            self._take_commands(answers)
        except RemoteProtocolError as error:
            self._write(b"".join(answers))
            self._give_up(error)
            return
        self._write(b"".join(answers))
        if self._conversation.asked is not None:
            self._watch_job()
        if self._conversation.is_over:
            self._close()
        else:
            self._count()
            self._restrain()

    def _take_commands(self, answers: list[bytes]) -> None:
        talk, framer = self._conversation, self._framer
        seconds = self._context.reactor.seconds
        until = seconds() + TURN
        while framer.at < len(framer.buffer):
            if talk.asked is not None:
                self._cancel_if_leaving()
            if talk.asked is not None or talk.is_over:
                break
            if seconds() > until:
                self._turn = self._turn or self._context.reactor.callLater(0, self._go_on)
                break
            said = talk.take(framer)
            if said is None:
                break
            if isinstance(said, bytes):
                answers.append(said)
            else:
                said.addCallback(self._answered).addErrback(self._lost)
        if framer.at:
            self._looked = max(0, self._looked - framer.at)
            framer.compact()

    def _go_on(self) -> None:
        """Others have had their turn."""
        self._turn = None
        if self._outbox.unread <= MAX_UNREAD:  # else once the MTA has read
            self._advance()

    def _answered(self, answer: bytes) -> None:
        """The milters' answer has come."""
        self._context.progress.stop(self)
        if self._framer.buffer:
            self._advance(answer)
        else:
            self._write(answer)
            self._count()

    def _lost(self, failure: Failure) -> None:
        """A defect of ours: the MTA hears the end of the connection instead of nothing."""
        self.log.failure("a verdict got lost", failure)
        self._close()

    def _give_up(self, error: RemoteProtocolError) -> None:
        if not self._conversation.is_turned_away:  # anybody may be that, as often as they like
            self.log.warn("closing a connection: {why}", why=str(error))
        self._close()

    # Signs of life, the MTA's and ours

    def timed_out(self) -> None:
        """The MTA has said nothing for longer than any SMTP client may be idle."""
        if self._conversation.asked is not None:  # it waits for us
            self._context.idle.set(self)
            return
        self.log.info("closing a connection that was idle for too long")
        self.let_go()

    def let_go(self) -> None:
        """Ends the connection; nothing waits to be answered."""
        if self._outbox.unread or self._congested:  # it has not read all
            self.abort()
        else:
            self._close()

    def _watch_job(self) -> None:
        """The milters are asked: the MTA hears of it from time to time, if it takes that."""
        talk = self._conversation
        early = talk.asked is not Stage.EOM
        if self not in self._context.progress and (not early or talk.takes_early_progress):
            self._context.progress.set(self)

    def send_progress(self) -> None:
        """A milter has been at work for an interval more."""
        self._write(_PROGRESS)
        self._context.progress.set(self)

    # The socket

    def finish(self) -> None:
        """The service stops now: whoever waits gets a verdict, then the connection ends."""
        self._write(self._conversation.end())
        self._close()

    def abort(self) -> None:
        """Ends the connection without waiting for what the MTA has not read yet."""
        transport: Any = self.transport
        transport.abortConnection()

    def _write(self, data: bytes) -> None:
        if data:
            self._outbox.write(data)

    def _read(self) -> None:
        """The MTA has taken some of its answers, or has begun to leave some unread."""
        closing, unread = self._context.closing, self._outbox.unread
        if not self._conversation.is_over and (not unread or self not in closing):
            self._context.idle.set(self)  # but a slow reader's time is one idle MTA's in all
        if unread:
            closing.set(self)
        elif not self._conversation.is_over:
            if not self._conversation.is_turned_away:
                closing.stop(self)
            if self._framer.buffer and self._turn is None:
                self._turn = self._context.reactor.callLater(0, self._go_on)
        self._count()
        self._restrain()

    def give_up_unread(self) -> None:
        """The MTA has taken nothing for CLOSE_GRACE."""
        if self._outbox.unread:
            self.log.warn(
                "closing a connection: the MTA has read nothing for {n:g} s, {unread} bytes wait",
                n=CLOSE_GRACE,
                unread=self._outbox.unread,
            )
        self.abort()

    def _count(self) -> None:
        """Counts what waits on its way in and out, and itself."""
        size = len(self._framer.buffer) + self._outbox.unread
        if size or self._conversation.transcript.size:
            size += CONNECTION_COST
        if size != self._claim.size:
            self._claim.set(size)

    def pauseProducing(self) -> None:
        """A transport that is no socket: the MTA reads more slowly than it asks."""
        self._congested = True
        self._context.idle.set(self)
        self._restrain()

    def resumeProducing(self) -> None:
        """The MTA has read its answers."""
        self._congested = False
        self._context.idle.set(self)
        self._restrain()

    def stopProducing(self) -> None:
        """The connection is lost, as connectionLost says too."""

    def _restrain(self) -> None:
        """Stops reading while too much waits, and goes on when it is worked off."""
        if self._conversation.is_over:
            return
        transport: Any = self.transport
        # A packet that is not complete yet is not waiting: it needs its rest.
        waiting = 0 if self._conversation.asked is None else len(self._framer.buffer)
        if waiting > SMALL_PART and not self._context.inflight.has_room(0):
            self._refuse_to_wait()
            return
        too_much = (
            self._turn is not None
            or self._congested
            or self._outbox.unread > MAX_UNREAD
            or waiting > self._context.limits.max_waiting
        )
        if too_much and not self._paused:
            transport.pauseProducing()
        elif self._paused and not too_much:
            transport.resumeProducing()
        self._paused = too_much

    def _refuse_to_wait(self) -> None:
        """The MTA sends on behind its question, for which there is no room.

        None does: it waits for the answer.
        """
        self.log.warn("closing a connection: there is no room for what waits behind a question")
        self._write(self._conversation.end(NO_ROOM))
        self._close()

    def _forget_commands(self) -> None:
        self._framer = Framer()
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.cancel()

    def _close(self) -> None:
        self._forget_commands()
        self._context.progress.stop(self)
        self._conversation.end()
        self._count()
        transport: Any = self.transport
        if transport.disconnecting:
            return
        if not is_socket(transport):
            transport.unregisterProducer()  # else what it has not read would keep it open
        transport.loseConnection()  # once the outbox is empty
        self._context.idle.stop(self)
        self._context.closing.set(self)


def _quick_ack_of(transport: Any) -> Callable[[], None] | None:
    """Has the kernel acknowledge at once what the MTA sends next; Linux forgets that by itself.

    Sendmail writes a macro packet and its command one by one with Nagle's algorithm on, and so
    waits for our acknowledgement, which would else be delayed by 40 ms, at every stage.
    """
    if not hasattr(socket, "TCP_QUICKACK"):
        return None
    sock: socket.socket = transport.getHandle()

    def acknowledge() -> None:
        with suppress(OSError):  # the connection is lost, which the reactor finds out too
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    acknowledge()
    return acknowledge
