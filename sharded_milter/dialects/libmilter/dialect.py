"""Dialects whose milters are objects: one object and one context for each connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from sharded_milter.dialects.libmilter.classes import NAMES, Milter, NetworkTypes
from sharded_milter.dialects.libmilter.context import (
    ABORT,
    NEGOTIATE,
    Call,
    Context,
    ReturnCodes,
    call_plainly,
)
from sharded_milter.errors import CallbackFailed, MilterLoadError
from sharded_milter.protocol.negotiation import (
    HEADER_ACTIONS,
    KNOWN_ACTIONS,
    KNOWN_PROTOCOL,
    LOWEST_VERSION,
    VERSION,
    Manifest,
    SessionAffinity,
)
from sharded_milter.protocol.stages import (
    NO_ACTIONS,
    NO_PROTOCOL,
    SYMLIST_STAGES,
    Actions,
    Protocol,
    Stage,
)

# Stages without replies: their verdicts are sent at end of message. The MTA has the whole message
# before it sends any of them, so this loses nothing, and saves a round trip for each field.
CONTENT = (Stage.HEADER, Stage.EOH, Stage.BODY)

# The versions of the protocol that introduced these commands.
_SINCE = {Stage.UNKNOWN: 3, Stage.DATA: 4}


class ObjectDialect(ABC):
    """Answers jobs with a context for each connection."""

    def __init__(self) -> None:
        self._contexts: dict[int, Context | None] = {}  # None: its object could not be built
        self._options = NO_PROTOCOL
        self._actions = NO_ACTIONS
        self.call: Call = call_plainly
        self.sandbox = False
        self.manifest = self._load()

    @abstractmethod
    def _load(self) -> Manifest:
        """Negotiate with the milter as an MTA that offers everything; set actions and options."""

    @abstractmethod
    def _make_context(self) -> Context:
        """Return the context of a new connection, with its callbacks."""

    def answer(
        self,
        stage: Stage | None,
        connection: bytes,
        message: bytes | memoryview,
        session: int = 0,
    ) -> bytes | Awaitable[bytes]:
        """Return the reply packets for the last of the packets, which are new to the object.

        `session` is the object's number; a new number builds a new object. Stage None ends the
        object. Raise the exceptions of its callbacks and its constructor, InvalidVerdict for an
        illegal return code, and CallbackFailed for an object that could not be built before.
        """
        if session not in self._contexts:
            if stage is None:  # the object was never built
                return b""
            # If this raises, no object is built later: it would miss the packets until then.
            self._contexts[session] = None
            self._contexts[session] = self._make_context()
        context = self._contexts[session]
        if stage is None:
            del self._contexts[session]
        if context is not None:
            return context.answer(stage, connection, message)
        if stage is None:
            return b""
        raise CallbackFailed(
            f"the {self.manifest.name} object of this connection could not be built"
        )

    def _make_manifest(
        self,
        actions: Actions,
        options: Protocol,
        needed: set[Stage],
        context: Context,
        *,
        ends: bool = False,
        **more: Any,
    ) -> Manifest:
        """Return the manifest for these actions, options and stages, with the context's macros."""
        return Manifest(
            actions=actions & ~Actions.SETSYMLIST,
            protocol=_protocol(needed, actions, options, ends=ends),
            macros=tuple((SYMLIST_STAGES[n], m) for n, m in sorted(context.symlists.items()) if m),
            **more,
        )


class ClassDialect(ObjectDialect):
    """Answers jobs with the objects of a factory."""

    def __init__(self, factory: Any) -> None:
        self._factory = factory
        super().__init__()

    def _make_context(self) -> Context:
        context = Context(NAMES, self._actions, self._options, lambda *args: self.call(*args))
        context.milter = self._build_object(context)
        context.callbacks = _callbacks(context.milter, self._options)
        return context

    def _build_object(self, context: Context) -> Milter:
        milter = self._factory.build_milter(context)
        if not isinstance(milter, Milter):
            raise MilterLoadError(
                f"{type(self._factory).__name__}.build_milter returned {milter!r:.80}, not a Milter"
            )
        milter._context = context
        return milter

    # Negotiation

    def _load(self) -> Manifest:
        context = Context(NAMES, NO_ACTIONS, NO_PROTOCOL, call_plainly)
        milter = self._build_object(context)
        name = type(milter).__name__
        with context.running(NEGOTIATE):
            result = milter.xxfi_negotiate(KNOWN_ACTIONS, KNOWN_PROTOCOL)
            version, actions, protocol = _negotiated(name, milter, result)
        needed = {stage for stage in Stage if milter._overrides(stage.code)} - {
            stage for stage in Stage if protocol & stage.suppress
        }
        needed -= {stage for stage, since in _SINCE.items() if version < since}
        self._actions, self._options = actions, protocol
        self.sandbox = milter.sandbox
        affinity = SessionAffinity.REPLAYABLE if milter.replayable else SessionAffinity.REQUIRED
        return self._make_manifest(
            actions,
            protocol,
            needed,
            context,
            ends=milter._overrides(ABORT),
            name=name,
            affinity=affinity,
            version=version,
        )


def _protocol(needed: set[Stage], actions: Actions, wanted: Protocol, *, ends: bool) -> Protocol:
    """Return the protocol bits: stages that are not sent, stages without a reply, and options.

    `ends` is True if the object needs end of message, to tell it from an abort.
    """
    suppressed = [stage.suppress for stage in Stage if stage not in needed]
    unanswered = [stage.no_reply for stage in CONTENT if stage in needed]
    word = reduce(or_, [*suppressed, *unanswered], NO_PROTOCOL)
    word |= wanted & reduce(or_, (stage.no_reply for stage in needed), NO_PROTOCOL)
    if needed.isdisjoint((*CONTENT, Stage.EOM)) and not ends:
        word |= Protocol.NR_EOM
    if Stage.HEADER in needed or actions & HEADER_ACTIONS:
        # It is hidden from an object that did not request it, but other milters may need it.
        word |= Protocol.HDR_LEADSPC
    return word | (wanted & Protocol.RCPT_REJ)


def _negotiated(name: str, milter: Milter, returned: object) -> tuple[int, Actions, Protocol]:
    """Return version, actions and protocol from the result of xxfi_negotiate.

    Raise MilterLoadError if it is malformed, or requests what no MTA offers.
    """
    result, version = returned, VERSION
    if isinstance(result, Sequence) and len(result) == 4:
        result, version, *words = result
        if result == ReturnCodes.CONTINUE:
            result = words
    if result in (None, ReturnCodes.CONTINUE, ReturnCodes.ALL_OPTS):
        result = Milter.xxfi_negotiate(milter, KNOWN_ACTIONS, KNOWN_PROTOCOL)
    if (
        not isinstance(result, Sequence)
        or not _are_integers([*result, version])
        or len(result) != 2
    ):
        raise MilterLoadError(
            f"{name}.xxfi_negotiate returned {returned!r:.80}; it must return actions and"
            " protocol, or CONTINUE"
        )
    actions, protocol = result
    if actions & ~KNOWN_ACTIONS or protocol & ~KNOWN_PROTOCOL:
        raise MilterLoadError(
            f"{name}.xxfi_negotiate requests actions {actions:#x} and protocol {protocol:#x};"
            f" MTAs offer at most {KNOWN_ACTIONS:#x} and {KNOWN_PROTOCOL:#x}"
        )
    if not LOWEST_VERSION <= version <= VERSION:
        raise MilterLoadError(
            f"{name}.xxfi_negotiate returned version {version}, which is not between"
            f" {LOWEST_VERSION} and {VERSION}"
        )
    return version, Actions(actions), Protocol(protocol)


def _are_integers(values: Sequence[object]) -> bool:
    return all(isinstance(value, int) and value >= 0 for value in values)


def _callbacks(milter: Milter, options: Protocol) -> Mapping[int, Callable[..., Any]]:
    """Return the callbacks that the author has overridden, by letter.

    Those of stages that the milter declined are left out: the MTA may send such a stage for another
    milter on the same connection.
    """
    declined = {stage.code for stage in Stage if options & stage.suppress}
    found: dict[int, Callable[..., Any]] = {
        code: getattr(milter, name)
        for code, name in NAMES.items()
        if code not in declined and milter._overrides(code)
    }
    connect = found.get(ord("C"))
    if connect is not None:
        found[ord("C")] = lambda *client: connect(*_client(*client))
    return found


_FAMILIES = {
    "inet": NetworkTypes.INET,
    "inet6": NetworkTypes.INET6,
    "unix": NetworkTypes.UNIX,
    "unknown": NetworkTypes.UNKNOWN,
}


def _client(hostname: str, family: str, address: str, port: int) -> tuple[Any, ...]:
    """Return the arguments of xxfi_connect."""
    where: Any = (address, port) if family in ("inet", "inet6") else address
    return hostname, _FAMILIES[family], None if family == "unknown" else where
