"""One MTA connection before several milters, without a network; see `one_mta`."""

from __future__ import annotations

from one_mta import BODY, CONTINUE, DATA, EOH, EOM, MAIL, RCPT, SUBJECT, Mta, packed
from twisted.logger import capturedLogs

from sharded_milter.dispatch.job import Job
from sharded_milter.protocol.negotiation import KNOWN_ACTIONS, Manifest, SessionAffinity
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import NO_PROTOCOL, Actions, Protocol, Stage

WHOLE = [MAIL, RCPT, DATA, SUBJECT, EOH, BODY, EOM]

ALL_NR = sum((stage.no_reply for stage in Stage), NO_PROTOCOL)


def answering(
    name: str,
    *stages: Stage,
    actions: int = KNOWN_ACTIONS & ~0x100,
    options: Protocol = NO_PROTOCOL,
    affinity: SessionAffinity = SessionAffinity.NONE,
) -> Manifest:
    """A milter that sees everything and answers these stages."""
    answered = sum((stage.no_reply for stage in stages), NO_PROTOCOL)
    return Manifest(name, Actions(actions), (ALL_NR & ~answered) | options, affinity=affinity)


A, B, C = (answering(name, *Stage) for name in "abc")


class Several(Mta):
    """An MTA before several milters; jobs are known by the name of the milter."""

    def __init__(self, *manifests: Manifest, **options: object) -> None:
        super().__init__(manifests=manifests, **options)  # type: ignore[arg-type]

    def out(self) -> dict[str, Job]:
        """The latest job of each milter whose answer is awaited."""
        return {
            job.manifest.name: job
            for job in self.pool.jobs
            if job.manifest and job.answer is not None
        }

    def asked(self, *commands: Packet) -> str:
        """Says the commands; the names of the milters that are asked then."""
        self.say(*commands)
        return "".join(self.out())

    def reply(self, name: str, *packets: Packet) -> list[bytes]:
        """A milter answers; what the MTA hears then."""
        self.written()
        self.pool.answer(self.out()[name], packed(*packets))
        return self.written()

    def lose(self, name: str, error: Exception) -> list[bytes]:
        """A milter fails; what the MTA hears then."""
        self.written()
        with capturedLogs():
            self.pool.answer(self.out()[name], error)
        return self.written()

    def go_on(self, *commands: Packet) -> None:
        """Says each of the commands, and all milters say CONTINUE."""
        for command in commands:
            self.say(command)
            while self.out():
                self.reply(next(iter(self.out())), CONTINUE)
