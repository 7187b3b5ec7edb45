"""Answers jobs with the callbacks that a pymilter script has registered.

The rules are libmilter's. In two cases libmilter would send no reply, and pymilter's exception
policy gives the verdict: for an exception in a callback without a reply, and for a verdict that is
illegal at its stage.
"""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from sharded_milter.dialects.libmilter.context import (
    ABORT,
    BODY,
    CLOSE,
    NEGOTIATE,
    Context,
    ReturnCodes,
)
from sharded_milter.dialects.libmilter.dialect import ObjectDialect
from sharded_milter.dialects.libmilter.reply import reply_lines
from sharded_milter.dialects.pymilter.context import ContextObject, error
from sharded_milter.dialects.pymilter.module import FAKED, NAMES, Registration
from sharded_milter.errors import InvalidVerdict, MilterLoadError
from sharded_milter.protocol.negotiation import (
    DEFAULT_ACTIONS,
    DEFAULT_PROTOCOL,
    KNOWN_ACTIONS,
    KNOWN_PROTOCOL,
    Manifest,
    SessionAffinity,
)
from sharded_milter.protocol.stages import NO_ACTIONS, NO_PROTOCOL, Actions, Protocol, Stage
from sharded_milter.protocol.text import to_wire

_FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6, "unix": socket.AF_UNIX}

# Bits that a script may request although the MTA did not offer them; libmilter ignores them then.
_DROPPED = FAKED | Protocol.NO_DATA | Protocol.NO_UNKNOWN

# The reply codes of the exception policies that refuse, as pymilter has them.
_POLICY_REPLIES = {ReturnCodes.TEMPFAIL: ("451", "4.3.0"), ReturnCodes.REJECT: ("554", "5.3.0")}
_NAME_SHOWN = 40


class PymilterDialect(ObjectDialect):
    """Answers jobs for a script. Raise MilterLoadError if the script refuses to negotiate."""

    def __init__(self, registration: Registration) -> None:
        self._script = registration
        super().__init__()

    def close(self) -> None:
        """End all connections, as if their clients had ended them; the worker stops."""
        for session in list(self._contexts):
            self.answer(None, b"", b"", session)

    def _load(self) -> Manifest:
        context, connection = self._new_context(NO_ACTIONS, NO_PROTOCOL)
        try:
            with context.running(NEGOTIATE):
                actions, options = self._negotiated(connection, KNOWN_ACTIONS, KNOWN_PROTOCOL)
        except Exception as failure:
            details = "".join(traceback.format_exception(failure))
            summary = f"{type(failure).__name__}: {failure}"
            raise MilterLoadError(f"negotiate() has failed: {summary}", details) from failure
        finally:
            context.answer(None, b"", b"")  # close the connection that was made for this
        self._actions, self._options = actions, options
        return self._make_manifest(
            actions,
            # The master does not keep commands without a reply, and the script needs this one.
            options & ~Protocol.NR_UNKNOWN,
            {stage for stage in Stage if self._is_wanted(stage, options)},
            context,
            ends=ABORT in self._script.callbacks,
            name=self._script.name or "pymilter",
            affinity=SessionAffinity.REQUIRED,
        )

    def _is_wanted(self, stage: Stage, options: Protocol) -> bool:
        return stage.code in self._script.callbacks and not options & stage.suppress

    def _make_context(self) -> Context:
        context, connection = self._new_context(self._actions, self._options)
        context.callbacks = {
            **context.callbacks,
            **self._callbacks(context, connection),
            NEGOTIATE: lambda *offer: self._negotiate(context, connection, *offer),
        }
        return context

    def _new_context(self, actions: Actions, options: Protocol) -> tuple[Context, ContextObject]:
        """Return a context whose only callback is close, and its object for the script."""
        context = Context(
            NAMES,
            actions,
            options,
            lambda *arguments: self.call(*arguments),
            lambda command, failure: self._apply_policy(context, command, failure),
        )
        connection = context.milter = ContextObject(context)
        context.callbacks = {CLOSE: lambda: self._close(connection)}
        self._script.made += 1
        return context, connection

    def _close(self, connection: ContextObject) -> int:
        self._script.deleted += 1
        close = self._script.callbacks.get(CLOSE)
        return _code(CLOSE, close(connection)) if close is not None else ReturnCodes.CONTINUE

    # Negotiation

    def _negotiate(
        self, context: Context, connection: ContextObject, actions: int, protocol: int
    ) -> int:
        """Call negotiate with the MTA's offer; if it fails, all callbacks return TEMPFAIL."""
        try:
            wanted = self._negotiated(
                connection, actions or DEFAULT_ACTIONS, protocol or DEFAULT_PROTOCOL
            )
        except Exception:
            traceback.print_exc()
            refuse = dict.fromkeys(NAMES, lambda *_: ReturnCodes.TEMPFAIL)
            context.callbacks = {**refuse, CLOSE: context.callbacks[CLOSE]}
        else:
            context.set_wanted(*wanted)
            suppressed = [stage.code for stage in Stage if wanted[1] & stage.suppress]
            context.callbacks = {
                code: callback
                for code, callback in context.callbacks.items()
                if code not in suppressed
            }
        return ReturnCodes.CONTINUE

    def _negotiated(
        self, connection: ContextObject, actions: int, protocol: int
    ) -> tuple[Actions, Protocol]:
        """Return the actions and the protocol that the script requests from the offer.

        Raise the exception of the callback, and InvalidVerdict for an illegal result.
        """
        actions &= KNOWN_ACTIONS
        opts: list[Any] = [actions, (protocol & KNOWN_PROTOCOL) | FAKED, 0, 0]
        negotiate = self._script.callbacks.get(NEGOTIATE)
        if negotiate is None:
            return Actions(self._script.flags & actions), self._suppress_missing()
        try:
            result = _code(NEGOTIATE, negotiate(connection, opts))
        except Exception:
            if self._script.policy != ReturnCodes.CONTINUE:
                raise
            traceback.print_exc()
            result = ReturnCodes.CONTINUE
        if result == ReturnCodes.ALL_OPTS:
            return Actions(actions), self._suppress_missing()
        if result != ReturnCodes.CONTINUE:
            raise InvalidVerdict(f"negotiate returned {result}, not CONTINUE or ALL_OPTS")
        wanted_actions, wanted = opts[0], opts[1]
        if wanted_actions & ~actions or wanted & ~(protocol | _DROPPED):
            raise InvalidVerdict(
                f"negotiate requests actions {wanted_actions:#x} and protocol {wanted:#x}; the MTA"
                f" offers {actions:#x} and {protocol:#x}"
            )
        return Actions(wanted_actions), Protocol(wanted)

    def _suppress_missing(self) -> Protocol:
        """Return the protocol bits that suppress the stages without a callback."""
        missing = (stage for stage in Stage if stage.code not in self._script.callbacks)
        return Protocol(sum(stage.suppress for stage in missing))

    # Callbacks

    def _callbacks(
        self, context: Context, connection: ContextObject
    ) -> dict[int, Callable[..., Any]]:
        return {
            code: _calling(code, callback, context, connection)
            for code, callback in self._script.callbacks.items()
            if code not in (NEGOTIATE, CLOSE)
        }

    def _apply_policy(self, context: Context, command: int, failure: Exception) -> ReturnCodes:
        """Log the exception of a callback and return the verdict of the exception policy."""
        traceback.print_exception(failure)
        sys.stderr.flush()
        code = ReturnCodes(self._script.policy)
        reply_codes = _POLICY_REPLIES.get(code)
        if reply_codes is not None:
            name = (self._script.name or "").translate(_NO_CONTROLS)[:_NAME_SHOWN]
            words = f"pymilter: untrapped exception in {name}"
            context.set_reply(reply_lines("", *reply_codes, [words]))
        if code is ReturnCodes.ACCEPT and command == ord("U"):
            return ReturnCodes.CONTINUE  # ACCEPT of an unknown command makes Postfix panic
        return code


_NO_CONTROLS = dict.fromkeys(range(0x20), " ")


def _calling(
    command: int, callback: Callable[..., Any], context: Context, connection: ContextObject
) -> Callable[..., int]:
    """Return a function that calls a callback with the arguments and result of the C half."""
    prepare: Callable[..., tuple[Any, ...]] = _ARGUMENTS.get(command, _as_they_are)

    def call(*arguments: Any) -> int:
        code = _code(command, callback(connection, *prepare(*arguments)))
        if code == ReturnCodes.NOREPLY and not context.has_no_reply(command):
            raise InvalidVerdict(f"{NAMES[command]} returned NOREPLY, which was not negotiated")
        # SKIP is for the body only: Postfix would skip other stages too, Sendmail does not know it.
        return ReturnCodes.CONTINUE if code == ReturnCodes.SKIP and command != BODY else code

    return call


def _as_they_are(*arguments: Any) -> tuple[Any, ...]:
    return arguments


def _code(command: int, result: object) -> int:
    """Return the result of a callback as a C int; raise `error` if it is not an int."""
    if not isinstance(result, int):
        raise error(f"The {NAMES[command]} callback must return int")
    code = int(result) & 0xFFFFFFFF
    return code - 0x100000000 if code > 0x7FFFFFFF else code


def _client(hostname: str, family: str, address: str, port: int) -> tuple[Any, ...]:
    """Return the arguments of connect."""
    number = _FAMILIES.get(family, socket.AF_UNSPEC)
    if number == socket.AF_UNSPEC:
        return hostname, 0, None
    if number == socket.AF_UNIX:
        return hostname, int(number), address
    address = socket.inet_ntop(number, socket.inet_pton(number, address.partition("%")[0]))
    where = (address, port) if number == socket.AF_INET else (address, port, 0, 0)
    return hostname, int(number), where


# The arguments that differ from those of the classes dialect: bytes that pymilter itself decodes.
_ARGUMENTS: dict[int, Callable[..., tuple[Any, ...]]] = {
    ord("C"): _client,
    ord("M"): lambda argv: tuple(map(to_wire, argv)),
    ord("R"): lambda argv: tuple(map(to_wire, argv)),
    ord("L"): lambda name, value: (name, to_wire(value)),
}
