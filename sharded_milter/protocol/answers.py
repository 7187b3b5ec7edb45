"""Checks of answers: the reply packets that are about to be sent to the MTA for one command.

A reply from a worker reaches the MTA only if it is legal at its stage, was negotiated and is
well-formed. The rules are LEGAL in `replies`; this module applies them.
"""

from __future__ import annotations

from sharded_milter.errors import LocalProtocolError, RemoteProtocolError
from sharded_milter.protocol.negotiation import Agreement
from sharded_milter.protocol.replies import LEGAL, Accept, Continue, Legality, ReplaceBody
from sharded_milter.protocol.stages import Stage
from sharded_milter.protocol.wire import LETTER, MAX_CHUNK, PAYLOAD, packets

_BODY = ReplaceBody.letter[0]

# The most common answers, which need no further check. Only answers of this length are looked up
# here: hashing a large one would cost as much as the full check.
_BARE = frozenset((Accept().encode(), Continue().encode()))


def check_replies(stage: Stage, replies: bytes, agreement: Agreement) -> int:
    """Return the letter of the final reply, which must be the last packet of `replies`.

    Raise LocalProtocolError if a reply is unknown, malformed, illegal at the stage, not covered by
    a negotiated action or out of order, or if there is no final reply.
    """
    permitted = agreement.cache.get(stage) or _permitted(stage, agreement)
    if len(replies) == PAYLOAD and replies in _BARE and replies[LETTER] in permitted:
        return replies[LETTER]
    final = before = None
    replaced = False
    try:
        for code, start, end in packets(replies):
            if final is not None:
                raise LocalProtocolError(f"reply {_name(code)} after the final one at {stage.word}")
            legal = permitted.get(code)
            if legal is None:
                raise LocalProtocolError(_reason(code, stage, agreement))
            _check_payload(code, legal, stage, replies, start, end)
            if code == _BODY:
                if replaced and before != _BODY:
                    raise LocalProtocolError("the new body is interrupted by another reply")
                replaced = True
            final = code if legal.final else None
            before = code
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"malformed reply at {stage.word}: {error}") from error
    if final is None:
        raise LocalProtocolError(f"no final reply at {stage.word}")
    return final


def _permitted(stage: Stage, agreement: Agreement) -> dict[int, Legality]:
    """Return the rules of the replies that may be sent at a stage; cached in the agreement."""
    permitted = agreement.cache[stage] = {
        code: legal
        for code, legal in LEGAL.items()
        if stage in legal.stages
        and not legal.action & ~agreement.actions
        and not legal.option & ~agreement.protocol
    }
    return permitted


def _reason(code: int, stage: Stage, agreement: Agreement) -> str:
    """Return the reason why a reply may not be sent."""
    if code not in LEGAL:
        return f"reply {_name(code)} does not exist"
    legal = LEGAL[code]
    if stage not in legal.stages:
        return f"reply {_name(code)} is not legal at {stage.word}"
    if legal.action & ~agreement.actions:
        return f"action {legal.action.name} was not negotiated"
    return f"{legal.option.name} was not negotiated"


def _check_payload(
    code: int, legal: Legality, stage: Stage, replies: bytes, start: int, end: int
) -> None:
    """Raise LocalProtocolError if the payload at `start` is too long or malformed."""
    if end - start > MAX_CHUNK:
        raise LocalProtocolError(f"reply {_name(code)} of {end - start} bytes exceeds {MAX_CHUNK}")
    if not legal.payload.fullmatch(replies, start, end):  # in place: a body may have megabytes
        payload = replies[start : min(end, start + 80)]
        raise LocalProtocolError(f"malformed reply {_name(code)} at {stage.word}: {payload!r}")


def _name(code: int) -> str:
    return repr(bytes((code,)))[1:]
