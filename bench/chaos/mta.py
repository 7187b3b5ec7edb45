"""An MTA that behaves badly, one connection after the other.

It cuts its packets anywhere and joins them, drops messages with ABORT, leaves in the middle in
every way there is, aborts while it waits for the verdict and goes on, and offers any options.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.chaos.answers import Answer, Owners, Wrong, check_end, check_recipient
from bench.chaos.messages import Message, made
from bench.chaos.wire import Closed, Wire
from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, KNOWN_PROTOCOL, VERSION
from sharded_milter.protocol.stages import STAGES, Protocol, Stage
from sharded_milter.protocol.wire import LETTER, MAX_CHUNK, PAYLOAD, frame

# Before it comes again where it was refused or has lost its connection, in seconds.
PAUSE = 0.1

# A share of the connections offers less than an MTA can: fewer stages without an answer, or a
# header field without the blank behind its colon.
FEWER_NO_REPLY, NO_LEADING_SPACE = 0.4, 0.3

CHUNKS = (MAX_CHUNK, MAX_CHUNK, 4_096, 1_000)

_NO_REPLY = Protocol(sum(stage.no_reply for stage in Stage if stage is not Stage.EOM))


@dataclass(frozen=True)
class Manner:
    """How the MTAs behave. The shares are of messages, times are seconds."""

    timeout: float = 60.0  # for any packet
    abort: float = 0.15  # dropped, or left alone with the connection, before their end
    abort_waiting: float = 0.06  # while the verdict is waited for
    many: int = 8  # messages on one connection at the most


@dataclass
class Account:
    """What became of all messages of all MTAs."""

    names: Sequence[str]  # the fields that the milters add
    counts: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    owners: Owners = field(default_factory=Owners)

    tempfailed: set[str] = field(default_factory=set)  # messages, in whole or in part

    def tempfail(self, stage: str, number: str) -> None:
        """A message was told so at this stage."""
        self.counts[f"tempfail at {stage}"] += 1
        self.tempfailed.add(number)

    def complain(self, kind: str, why: str) -> None:
        """Something went wrong; `kind` is `foreign`, `missing` or `closed`."""
        self.counts[kind] += 1
        self.complaints.append(why)


class _Left(Exception):
    """The MTA has left, as it wanted."""


class Mta:
    """The MTA of a number, which sends so many messages to a path or to HOST:PORT."""

    def __init__(
        self, target: str, name: str, messages: int, account: Account, manner: Manner
    ) -> None:
        self._target = target
        self._name = name
        self._left = messages
        self._account = account
        self._manner = manner
        self._random = random.Random(name)
        self._sent = 0

    async def run(self) -> None:
        """Sends them all; every failure is in the account."""
        while self._left:
            try:
                await self._connect()
            except _Left:
                continue
            except Wrong as error:
                self._account.complain("foreign", f"{self._where()} {error}")
            except TimeoutError:
                self._account.complain("missing", f"{self._where()}: no answer in time")
            except (Closed, OSError) as error:
                self._account.complain("closed", f"{self._where()}: {error}")
                await asyncio.sleep(PAUSE)

    def _where(self) -> str:
        return f"message {self._number()}"

    def _number(self) -> str:
        return f"{self._name}-{self._sent}"

    async def _connect(self) -> None:
        self._wire = await Wire.open(self._target, self._random, self._manner.timeout)
        self._late: Message | None = None
        try:
            await self._negotiate()
            await self._greet()
            for _ in range(min(self._left, self._random.randint(1, self._manner.many))):
                await self._message()
                if self._random.random() < 0.05:
                    await self._wire.send(commands.QuitNc().encode())
                    await self._greet()
            await self._wire.send(commands.Quit().encode(), now=True)
            await self._wire.wait_closed()
            if self._late is None:
                self._wire.check_silence()
        finally:
            self._wire.close()
            self._account.counts["progress"] += self._wire.progress

    async def _negotiate(self) -> None:
        offer = KNOWN_PROTOCOL
        if self._random.random() < FEWER_NO_REPLY:
            offer &= ~(_NO_REPLY & Protocol(self._random.getrandbits(21)))
        if self._random.random() < NO_LEADING_SPACE:
            offer &= ~Protocol.HDR_LEADSPC
        said = commands.Negotiate(VERSION, KNOWN_ACTIONS, offer)
        await self._wire.send(said.encode(), now=True)
        packet = await self._wire.packet()
        if packet[LETTER] != commands.Negotiate.letter[0]:
            await self._refused(packet)
        self._protocol = Protocol(commands.Negotiate.parse(packet[PAYLOAD:]).protocol)
        if self._protocol & ~offer:
            raise Wrong(f"got the options {self._protocol!r} of {offer!r}")

    async def _refused(self, packet: bytes) -> None:
        """In place of the negotiation: come back later, or nothing sensible."""
        self._wire.received[:0] = packet
        await self._come_back(await self._wire.answer(), "negotiation")

    async def _come_back(self, answer: Answer, at: str) -> None:
        if not answer.temporary or answer.changes:
            raise Wrong(f"got for its {at}: {answer}")
        self._account.counts["turned away"] += 1
        self._wire.close()
        await asyncio.sleep(PAUSE)
        raise _Left

    async def _greet(self) -> None:
        macros = (("j", "mx.example"), ("v", "Postfix 3.7"))
        greeting = (
            (commands.Macro("C", macros), commands.Connect("client.example", "4", 25, "192.0.2.7")),
            (commands.Macro("H"), commands.Helo("client.example")),
        )
        for macro, said in greeting:
            answer = await self._ask(macro.encode(), said.encode())
            if answer is not None and not answer.proceeds:
                await self._come_back(answer, type(said).__name__.lower())

    # One message

    async def _message(self) -> None:
        """Sends one, or a part of it; raises _Left when the connection is over."""
        self._sent += 1
        self._left -= 1
        self._account.counts["messages"] += 1
        message = made(self._number())
        steps = list(self._steps(message))
        leaves = self._random.random() < self._manner.abort
        last = self._random.randrange(len(steps)) if leaves else -1
        for at, (macro, packet, recipient) in enumerate(steps):
            if at == last:
                return await self._drop()
            answer = await self._ask(macro, packet)
            if recipient:
                await self._take_recipient(message, recipient, answer)
            elif answer is not None and not answer.proceeds:
                return await self._failed(message, answer)
        if not message.accepted:
            self._account.counts["without recipient"] += 1
            return await self._wire.send(commands.Abort().encode())
        return await self._end(message)

    def _steps(self, message: Message) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Macros, packet, and the recipient that it names, but for the end."""
        queue_id = b"i\0" + message.number.encode() + b"\0"
        yield frame(b"D", b"M" + queue_id), frame(b"M", message.sender + b"\0"), b""
        for recipient in message.recipients:
            macro = frame(b"D", b"R{rcpt_addr}\0" + recipient + b"\0")
            yield macro, frame(b"R", recipient + b"\0SIZE=1\0"), recipient
        yield frame(b"D", b"T"), frame(b"T"), b""
        space = b" " if self._protocol & Protocol.HDR_LEADSPC else b""
        for name, value in message.fields:
            yield b"", frame(b"L", name + b"\0" + space + value + b"\0"), b""
        yield frame(b"D", b"N"), frame(b"N"), b""
        size = self._random.choice(CHUNKS)
        for at in range(0, len(message.body), size):
            yield b"", frame(b"B", message.body[at : at + size]), b""

    async def _take_recipient(
        self, message: Message, recipient: bytes, answer: Answer | None
    ) -> None:
        self._account.counts["recipients"] += 1
        if answer is None or check_recipient(answer, recipient):
            message.accepted.append(recipient)
        elif answer.temporary:
            self._account.tempfail("rcpt", message.number)
            self._leave_after(answer)
        else:
            self._account.counts["recipients refused"] += 1

    async def _failed(self, message: Message, answer: Answer) -> None:
        """Before the end of a message there is no reason for anything but a temporary refusal."""
        if not answer.temporary or answer.changes:
            raise Wrong(f"got before its end: {answer}")
        self._account.tempfail("another stage", message.number)
        self._leave_after(answer)
        await self._wire.send(commands.Abort().encode())

    async def _end(self, message: Message) -> None:
        self._account.owners.add(message)
        began = time.monotonic()
        macro = frame(b"D", b"Ei\0" + message.number.encode() + b"\0")
        await self._wire.send(macro + commands.Eom().encode(), now=True)
        if self._random.random() < self._manner.abort_waiting:
            await asyncio.sleep(self._random.random() * 0.01)
            self._account.counts["dropped while waiting"] += 1
            self._late = message
            return await self._drop()
        self._account.counts["asked"] += 1
        answer = await self._answer()
        self._account.latencies.append(time.monotonic() - began)
        became = check_end(answer, message, self._account.names, self._account.owners)
        if became == "tempfail":
            self._account.tempfail("eom", message.number)
        else:
            self._account.counts[became] += 1
        self._leave_after(answer)
        return None

    def _leave_after(self, answer: Answer) -> None:
        """Raises _Left where the answer says that the connection is over."""
        if answer.ends_connection:
            self._wire.close()
            raise _Left

    async def _drop(self) -> None:
        """ABORT and go on, or the end of the connection in one of its ways."""
        kind = self._random.random()
        self._account.counts["dropped"] += 1
        if kind < 0.5:
            return await self._wire.send(commands.Abort().encode())
        if kind < 0.7:
            self._wire.reset()
        elif kind < 0.85:
            both = commands.Abort().encode() + commands.Quit().encode()
            await self._wire.send(both, now=True)
        raise _Left

    # Questions and answers

    async def _ask(self, macro: bytes, packet: bytes) -> Answer | None:
        """Sends it if it is wanted; None where no answer is due."""
        stage = STAGES[packet[LETTER]]
        await self._wire.send(macro)
        if self._protocol & stage.suppress:
            return None
        await self._wire.send(packet)
        return None if self._protocol & stage.no_reply else await self._answer()

    async def _answer(self) -> Answer:
        """The answer to what was sent last.

        What was under way to a message that was dropped while it was waited for may come before it.
        Whether that is so cannot always be told: then the MTA leaves.
        """
        if self._late is None:
            self._wire.check_silence()
            return await self._wire.answer()
        answer = await self._wire.answer()
        late, self._late = self._late, None
        if answer.temporary and not answer.changes:
            self._wire.close()
            raise _Left
        if not answer.changes and late.number.encode() not in answer.text:
            return answer
        try:
            check_end(answer, late, self._account.names, self._account.owners)
        except Wrong as error:
            raise Wrong(f"follows the dropped message {late.number}, which {error}") from None
        self._account.counts["late"] += 1
        return await self._wire.answer()
