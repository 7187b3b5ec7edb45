"""The replies to the MTA when a milter gives no verdict. Every failure is an explicit verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sharded_milter.errors import InvalidValue, JobFailed, Overloaded, Poisoned, Superseded
from sharded_milter.protocol.replies import Continue, Reject, ReplyCode, TempFail, reply_text
from sharded_milter.protocol.stages import Stage

CHOICES = ("tempfail", "accept", "reject")


@dataclass(frozen=True)
class Policy:
    """The operator's choices, each one of CHOICES; raise InvalidValue for any other value."""

    on_error: str = "tempfail"
    on_poison: str = "tempfail"

    def __post_init__(self) -> None:
        for name, choice in (("on_error", self.on_error), ("on_poison", self.on_poison)):
            if choice not in CHOICES:
                choices = ", ".join(CHOICES)
                raise InvalidValue(f"{name} is {choice!r}; it must be one of {choices}")


# These replies have no text of ours: the cause is in our log, not on the wire. To accept is to
# reply CONTINUE, so that later stages can still reject.
_ANSWERS: Mapping[str, bytes] = {
    "tempfail": TempFail().encode(),
    "accept": Continue().encode(),
    "reject": Reject().encode(),
}

BUSY = ReplyCode(reply_text(451, "4.3.2", "Content filter is busy, please try again")).encode()
NOT_ALLOWED = ReplyCode(
    reply_text(451, "4.3.5", "Content filter is not open to this mail server")
).encode()
TOO_LARGE = ReplyCode(
    reply_text(552, "5.3.4", "Message is larger than the content filter takes")
).encode()
NO_ROOM = ReplyCode(
    reply_text(452, "4.3.1", "Content filter has too much mail in hand, please try again")
).encode()
RELOADED = ReplyCode(
    reply_text(421, "4.3.2", "Content filter was reloaded, please connect again")
).encode()
STOPPING = ReplyCode(reply_text(451, "4.3.2", "Content filter is shutting down")).encode()


def answer_for(error: BaseException | None, policy: Policy, stage: Stage) -> bytes:
    """Return the reply packets for a job that ended with `error`.

    Overload always gives a temporary failure: the message was not scanned.
    """
    if isinstance(error, Overloaded):
        return BUSY
    if isinstance(error, Superseded):
        return RELOADED
    if isinstance(error, Poisoned):
        return _ANSWERS[policy.on_poison]
    if not isinstance(error, JobFailed) and stage is not Stage.EOM:
        return _ANSWERS["tempfail"]
    return _ANSWERS[policy.on_error]
