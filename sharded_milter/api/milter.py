"""`Milter`: the functions that an author registers by stage, and the verdicts of each stage.

The functions decide what is negotiated: the MTA does not send a stage that has no function, or
does not wait for its reply.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from sharded_milter.api.values import Address, Connection, Envelope, Headers, Message
from sharded_milter.api.verdicts import Accept, Discard, Reject, TempFail, Verdict
from sharded_milter.errors import InvalidValue, InvalidVerdict

# The verdicts of each stage. An Accept before end of message has no actions; only the check at run
# time can see that. Accept and Discard at `rcpt` would apply to the whole message with all its
# recipients, so a recipient can only be refused.
ClientVerdict = Accept | Reject | TempFail | None
EnvelopeVerdict = Accept | Reject | TempFail | Discard | None
RefusalVerdict = Reject | TempFail | None

_REFUSALS = (Reject, TempFail)
VERDICTS: Mapping[str, tuple[type, ...]] = {
    "connect": (Accept, *_REFUSALS),
    "helo": (Accept, *_REFUSALS),
    "mail": (Accept, *_REFUSALS, Discard),
    "rcpt": _REFUSALS,
    "data": (Accept, *_REFUSALS, Discard),
    "eoh": (Accept, *_REFUSALS, Discard),
    "eom": (Accept, *_REFUSALS, Discard),
    "unknown": _REFUSALS,
}

# The protocol has macro lists for all stages except `unknown`.
MACRO_STAGES = tuple(stage for stage in VERDICTS if stage != "unknown")

# Names for each stage. Sendmail takes at most 50, and sends up to 20 in any case.
MAX_MACROS = 30
_MACRO = re.compile(r"[!-z|~]|\{[!-z|~]+\}")

ShardBy = Literal["", "sender", "recipient", "client", "session"]
SHARD_BY: tuple[ShardBy, ...] = ("", "sender", "recipient", "client", "session")

ConnectF = TypeVar(
    "ConnectF", bound=Callable[[Connection], ClientVerdict | Awaitable[ClientVerdict]]
)
HeloF = TypeVar("HeloF", bound=Callable[[Connection], ClientVerdict | Awaitable[ClientVerdict]])
MailF = TypeVar("MailF", bound=Callable[[Envelope], EnvelopeVerdict | Awaitable[EnvelopeVerdict]])
RcptF = TypeVar(
    "RcptF", bound=Callable[[Address, Envelope], RefusalVerdict | Awaitable[RefusalVerdict]]
)
DataF = TypeVar("DataF", bound=Callable[[Envelope], EnvelopeVerdict | Awaitable[EnvelopeVerdict]])
EohF = TypeVar(
    "EohF", bound=Callable[[Envelope, Headers], EnvelopeVerdict | Awaitable[EnvelopeVerdict]]
)
EomF = TypeVar("EomF", bound=Callable[[Message], Verdict | Awaitable[Verdict]])
UnknownF = TypeVar(
    "UnknownF", bound=Callable[[str, Connection], RefusalVerdict | Awaitable[RefusalVerdict]]
)


@dataclass(frozen=True, slots=True)
class Callback:
    """A registered function. `light` is the author's promise that it is cheap."""

    function: Callable[..., Any]
    light: bool


class Milter:
    """A mail filter made of functions.

    `name` is used in logs. `macros` are the MTA's macros to request for each stage, in addition to
    those that it sends in any case: `{"eom": ["{auth_authen}"]}`. `shard_by` sends messages with
    an equal key to the same worker while that is possible, so that its caches stay warm.
    `sandbox=True` promises that the milter works in the sandbox: after it is imported, it only
    reads its own folder, writes nothing, and uses no network and no other programs, except as the
    operator allows.

    Register a function with `light=True` if it is cheap and never blocks; it may then run before
    heavy ones. Any function may be `async def`. An exception is logged with its traceback, and the
    message gets the operator's `--on-error` verdict. Raise InvalidValue for bad arguments.
    """

    def __init__(
        self,
        name: str,
        *,
        macros: Mapping[str, Sequence[str]] | None = None,
        shard_by: ShardBy = "",
        sandbox: bool = False,
    ) -> None:
        if not name or not name.isprintable():
            raise InvalidValue(f"milter name {name!r} is empty or not printable")
        if shard_by not in SHARD_BY:
            raise InvalidValue(f"shard_by {shard_by!r} is not one of {', '.join(SHARD_BY[1:])}")
        self.name = name
        if not isinstance(macros or {}, Mapping):
            raise InvalidValue(f"macros {macros!r:.80} are not a mapping such as {{'eom': ['i']}}")
        self.macros = {stage: _checked_macros(stage, m) for stage, m in (macros or {}).items()}
        self.shard_by = shard_by
        self.sandbox = sandbox
        self.callbacks: dict[str, Callback] = {}

    def __repr__(self) -> str:
        return f"Milter({self.name!r}, stages={sorted(self.callbacks)})"

    def _register(self, stage: str, function: Any, light: bool) -> Any:
        if function is None:
            return lambda function: self._register(stage, function, light)
        if not callable(function):
            raise InvalidValue(f"milter {self.name}: {stage} callback {function!r} is not callable")
        if stage in self.callbacks:
            raise InvalidValue(f"milter {self.name} has two {stage} callbacks")
        self.callbacks[stage] = Callback(function, light)
        return function

    @overload
    def connect(self, callback: ConnectF, /, *, light: bool = False) -> ConnectF: ...
    @overload
    def connect(self, *, light: bool = False) -> Callable[[ConnectF], ConnectF]: ...
    def connect(self, callback: Any = None, *, light: bool = False) -> Any:
        """Register `f(connection)`, called when a client has connected."""
        return self._register("connect", callback, light)

    @overload
    def helo(self, callback: HeloF, /, *, light: bool = False) -> HeloF: ...
    @overload
    def helo(self, *, light: bool = False) -> Callable[[HeloF], HeloF]: ...
    def helo(self, callback: Any = None, *, light: bool = False) -> Any:
        """Register `f(connection)`, called at each HELO or EHLO, with `connection.helo` set."""
        return self._register("helo", callback, light)

    @overload
    def mail(self, callback: MailF, /, *, light: bool = False) -> MailF: ...
    @overload
    def mail(self, *, light: bool = False) -> Callable[[MailF], MailF]: ...
    def mail(self, callback: Any = None, *, light: bool = False) -> Any:
        """Register `f(envelope)`, called at MAIL, with the sender."""
        return self._register("mail", callback, light)

    @overload
    def rcpt(self, callback: RcptF, /, *, light: bool = False) -> RcptF: ...
    @overload
    def rcpt(self, *, light: bool = False) -> Callable[[RcptF], RcptF]: ...
    def rcpt(self, callback: Any = None, *, light: bool = False) -> Any:
        """Register `f(recipient, envelope)`, called at RCPT; `envelope` has those before it."""
        return self._register("rcpt", callback, light)

    @overload
    def data(self, callback: DataF, /, *, light: bool = False) -> DataF: ...
    @overload
    def data(self, *, light: bool = False) -> Callable[[DataF], DataF]: ...
    def data(self, callback: Any = None, *, light: bool = False) -> Any:
        """Register `f(envelope)`, called at DATA."""
        return self._register("data", callback, light)

    @overload
    def eoh(self, callback: EohF, /, *, light: bool = False) -> EohF: ...
    @overload
    def eoh(self, *, light: bool = False) -> Callable[[EohF], EohF]: ...
    def eoh(self, callback: Any = None, *, light: bool = False) -> Any:
        """Register `f(envelope, headers)`, called when the header is complete."""
        return self._register("eoh", callback, light)

    @overload
    def eom(self, callback: EomF, /, *, light: bool = False) -> EomF: ...
    @overload
    def eom(self, *, light: bool = False) -> Callable[[EomF], EomF]: ...
    def eom(self, callback: Any = None, *, light: bool = False) -> Any:
        """Register `f(message)`, called at end of message; only it may return actions."""
        return self._register("eom", callback, light)

    @overload
    def unknown(self, callback: UnknownF, /, *, light: bool = False) -> UnknownF: ...
    @overload
    def unknown(self, *, light: bool = False) -> Callable[[UnknownF], UnknownF]: ...
    def unknown(self, callback: Any = None, *, light: bool = False) -> Any:
        """Register `f(command, connection)`, called for a command that the MTA does not know."""
        return self._register("unknown", callback, light)


def check_verdict(stage: str, verdict: object) -> Verdict:
    """Return the verdict if it is legal at the stage.

    Raise InvalidVerdict, which names the stage, the value, and the verdicts that are legal.
    """
    allowed = VERDICTS[stage]
    if verdict is not None and not isinstance(verdict, allowed):
        names = ", ".join(kind.__name__ for kind in allowed)
        hint = " (is an `await` missing?)" if inspect.isawaitable(verdict) else ""
        raise InvalidVerdict(
            f"the {stage} callback returned {verdict!r:.200}{hint}; it may return {names} or None"
        )
    if isinstance(verdict, Accept) and verdict.actions and stage != "eom":
        raise InvalidVerdict(
            f"the {stage} callback returned actions; only an eom callback may return actions"
        )
    return verdict  # type: ignore[return-value]  # narrowed by the table


def _checked_macros(stage: str, names: Sequence[str]) -> tuple[str, ...]:
    if stage not in MACRO_STAGES:
        raise InvalidValue(f"macros for {stage!r}: the stages are {', '.join(MACRO_STAGES)}")
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) > MAX_MACROS:
        raise InvalidValue(f"macros for {stage} are not a list of at most {MAX_MACROS} names")
    for name in names:
        if not isinstance(name, str) or not _MACRO.fullmatch(name):
            raise InvalidValue(f"macro {name!r} is not one character, or a longer name in braces")
    return tuple(names)
