"""The functions dialect: answers jobs with the callbacks of a `sharded_milter.Milter`."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import reduce
from operator import or_
from typing import Any

from sharded_milter.api.milter import Milter, check_verdict
from sharded_milter.api.verdicts import Accept, ChangeHeader, Verdict
from sharded_milter.dialects.functions.replies import to_replies
from sharded_milter.dialects.libmilter.context import Call, call_plainly
from sharded_milter.dialects.transcript import EnvelopeReader, ParsedTranscript, read
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.stages import NO_ACTIONS, NO_PROTOCOL, Actions, Protocol, Stage

_CLIENT = frozenset({Stage.CONNECT, Stage.HELO})
_ENVELOPE = _CLIENT | {Stage.MAIL, Stage.RCPT}

# The stages whose commands are needed to make the arguments of a callback.
NEEDS = {
    Stage.CONNECT: frozenset({Stage.CONNECT}),
    Stage.HELO: _CLIENT,
    Stage.MAIL: _CLIENT | {Stage.MAIL},
    Stage.RCPT: _ENVELOPE,
    Stage.DATA: _ENVELOPE | {Stage.DATA},
    Stage.EOH: _ENVELOPE | {Stage.HEADER, Stage.EOH},
    Stage.EOM: _ENVELOPE | {Stage.HEADER, Stage.BODY},
    Stage.UNKNOWN: _CLIENT | {Stage.UNKNOWN},
}

# The stages whose transcript grows from job to job, so that it is parsed step by step.
_GROWING = frozenset({Stage.MAIL, Stage.RCPT, Stage.DATA})

# All actions of an Accept at end of message. A milter does not say in advance which it will use.
ALL_ACTIONS = (
    Actions.ADDHDRS
    | Actions.CHGBODY
    | Actions.ADDRCPT
    | Actions.DELRCPT
    | Actions.CHGHDRS
    | Actions.QUARANTINE
    | Actions.CHGFROM
    | Actions.ADDRCPT_PAR
)

ARGUMENTS: dict[Stage, Callable[[ParsedTranscript], tuple[Any, ...]]] = {
    Stage.CONNECT: lambda t: (t.connection_value(),),
    Stage.HELO: lambda t: (t.connection_value(),),
    Stage.MAIL: lambda t: (t.envelope_value(),),
    Stage.RCPT: lambda t: (t.recipients[-1], t.envelope_value(t.recipients[:-1])),
    Stage.DATA: lambda t: (t.envelope_value(),),
    Stage.EOH: lambda t: (t.envelope_value(), t.headers_value()),
    Stage.EOM: lambda t: (t.message_value(),),
    Stage.UNKNOWN: lambda t: (t.command, t.connection_value()),
}


def manifest_of(milter: Milter) -> Manifest:
    """Return the manifest: stages that are not sent, stages without a reply, actions, macros."""
    answered = {Stage[word.upper()] for word in milter.callbacks}
    needed = frozenset[Stage]().union(*(NEEDS[stage] for stage in answered))
    suppressed = (stage.suppress for stage in Stage if stage not in needed)
    unanswered = (stage.no_reply for stage in (needed | {Stage.EOM}) - answered)
    protocol = reduce(or_, [*suppressed, *unanswered], NO_PROTOCOL)
    if Stage.HEADER in needed:
        # Without it the MTA removes the space after each colon, which breaks every DKIM signature.
        protocol |= Protocol.HDR_LEADSPC
    return Manifest(
        name=milter.name,
        actions=ALL_ACTIONS if Stage.EOM in answered else NO_ACTIONS,
        protocol=protocol,
        macros=tuple((Stage[word.upper()], names) for word, names in milter.macros.items()),
        light=frozenset(Stage[word.upper()] for word, c in milter.callbacks.items() if c.light),
        shard_by=milter.shard_by,
    )


class FunctionDialect:
    """Answers jobs for one milter made of functions; it keeps parsed envelopes between jobs."""

    def __init__(self, milter: Milter) -> None:
        self.manifest = manifest_of(milter)
        self.sandbox = milter.sandbox
        self.call: Call = call_plainly
        self._envelopes = EnvelopeReader()
        self._callbacks = {
            Stage[word.upper()]: (word, callback.function)
            for word, callback in milter.callbacks.items()
        }

    def answer(
        self, stage: Stage | None, connection: bytes, message: bytes | memoryview, session: int = 0
    ) -> bytes | Awaitable[bytes]:
        """Return the reply packets for a transcript at `stage`, or an awaitable of them.

        Raise the exception of the callback, and InvalidVerdict for an illegal verdict.
        """
        assert stage is not None  # there is no function for the end of a connection
        reader = self._envelopes.read if stage in _GROWING else read
        transcript = reader(connection, message)
        word, function = self._callbacks[stage]
        verdict = self.call(word, function, ARGUMENTS[stage](transcript))
        if inspect.isawaitable(verdict):
            return _await_replies(word, verdict, transcript)
        return _encode_replies(word, verdict, transcript)


async def _await_replies(word: str, verdict: Awaitable[Any], transcript: ParsedTranscript) -> bytes:
    return _encode_replies(word, await verdict, transcript)


def _encode_replies(word: str, verdict: object, transcript: ParsedTranscript) -> bytes:
    checked = check_verdict(word, verdict)
    names = transcript.header_names() if _changes_headers(checked) else None
    return to_replies(checked, transcript.protocol, names)


def _changes_headers(verdict: Verdict) -> bool:
    """Return True if the reply depends on the header fields that exist."""
    return isinstance(verdict, Accept) and any(
        isinstance(action, ChangeHeader) for action in verdict.actions
    )
