"""libmilter's context of one connection: it calls an object's callbacks as libmilter would.

It processes the packets of a transcript, each once, in order, and returns the reply to the last.
The master sends header fields and the body together with end of message. So a verdict that a
callback returns for one of them is kept, and is the reply to all later commands of the message.

The rules, from libmilter's documentation and behaviour: a message ends once, with `eom`, `abort`
or a verdict of the milter; a connection ends once, with `close`; no callback comes after an end.

It is one long class, because authors call all of it on one object.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from sharded_milter.dialects.libmilter.changes import Changes
from sharded_milter.dialects.libmilter.steps import Steps, run
from sharded_milter.dialects.libmilter.symbols import Symbols
from sharded_milter.dialects.transcript import client_of
from sharded_milter.errors import CallRefused, InvalidVerdict
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.stages import STAGES, Actions, Protocol, Stage
from sharded_milter.protocol.text import to_text
from sharded_milter.protocol.wire import packets


class ReturnCodes(IntEnum):
    """The return codes of callbacks (SMFIS_*)."""

    CONTINUE = 0
    REJECT = 1
    DISCARD = 2
    ACCEPT = 3
    TEMPFAIL = 4
    NOREPLY = 7
    SKIP = 8
    ALL_OPTS = 10  # only in negotiate


_CODES = {stage: stage.code for stage in Stage}
EOM, BODY, RCPT = _CODES[Stage.EOM], _CODES[Stage.BODY], _CODES[Stage.RCPT]
NEGOTIATE = commands.Negotiate.letter[0]
MACRO = commands.Macro.letter[0]
ABORT = commands.Abort.letter[0]
CLOSE = commands.Quit.letter[0]
_REFUSED = replies.Reject.letter[0]

# The commands of a message; the first of them begins it.
_MESSAGE = frozenset(b"MRTLNBE")
# The commands of its content. They have no replies: verdicts are kept for the end of the message.
_CONTENT = frozenset(b"LNB")

_ALWAYS = {ReturnCodes.CONTINUE, ReturnCodes.REJECT, ReturnCodes.TEMPFAIL}
_IN_MESSAGE = {*_ALWAYS, ReturnCodes.ACCEPT, ReturnCodes.DISCARD}

# The return codes that each callback may use. MTAs ignore DISCARD before there is a message, and
# ACCEPT of an unknown command makes Postfix's smtpd panic.
VERDICTS: Mapping[int, frozenset[ReturnCodes]] = {
    **dict.fromkeys(b"CH", frozenset({*_ALWAYS, ReturnCodes.ACCEPT})),
    **dict.fromkeys(b"MRTE", frozenset(_IN_MESSAGE)),
    **dict.fromkeys(b"LN", frozenset({*_IN_MESSAGE, ReturnCodes.NOREPLY})),
    **dict.fromkeys(b"B", frozenset({*_IN_MESSAGE, ReturnCodes.NOREPLY, ReturnCodes.SKIP})),
    **dict.fromkeys(b"U", frozenset(_ALWAYS)),
}

# The return codes of a callback for which the milter has negotiated "no reply". libmilter allows
# no others: the MTA would not get the verdict.
_UNANSWERED = frozenset({ReturnCodes.CONTINUE, ReturnCodes.NOREPLY})

# Verdicts that do not end the message: they refuse one recipient or one DATA command.
_OPEN = {
    _CODES[Stage.RCPT]: {ReturnCodes.REJECT, ReturnCodes.TEMPFAIL},
    _CODES[Stage.DATA]: {ReturnCodes.REJECT, ReturnCodes.TEMPFAIL},
}

_PLAIN = {
    ReturnCodes.CONTINUE: replies.Continue().encode(),
    ReturnCodes.REJECT: replies.Reject().encode(),
    ReturnCodes.TEMPFAIL: replies.TempFail().encode(),
    ReturnCodes.ACCEPT: replies.Accept().encode(),
    ReturnCodes.DISCARD: replies.Discard().encode(),
}
_CONTINUE = _PLAIN[ReturnCodes.CONTINUE]
_REPLY_CLASS = {ReturnCodes.REJECT: "5", ReturnCodes.TEMPFAIL: "4"}


def _argv(payload: bytes) -> tuple[str, ...]:
    return tuple(to_text(payload[:-1]).split("\0"))


# The functions that make the arguments of a callback from the payload of its command.
ARGUMENTS: Mapping[int, Callable[[bytes], tuple[Any, ...]]] = {
    **dict.fromkeys(b"TNEAQ", lambda _: ()),
    **dict.fromkeys(b"MR", lambda payload: (_argv(payload),)),
    **dict.fromkeys(b"HUL", _argv),
    **dict.fromkeys(b"B", lambda payload: (payload,)),
    **dict.fromkeys(b"C", lambda payload: client_of(commands.Connect.parse(payload))),
}

Call = Callable[..., Any]

# Returns the verdict for an exception, from the letter of the callback that raised it.
OnError = Callable[[int, Exception], ReturnCodes]


def _code_of(result: object) -> ReturnCodes | None:
    """Return the code that a callback returned; None for other values, also for True and False."""
    if isinstance(result, bool):
        return None
    try:
        return ReturnCodes(result)  # type: ignore[arg-type]  # any object may be returned
    except ValueError:
        return None


def call_plainly(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call it. A caller that measures callbacks replaces this function by its own."""
    return function(*arguments)


class Context:
    """The state of one connection, and the calls that a milter may make.

    `callbacks` are those of the object, by the letter of the command (`Q` is close); a missing one
    counts as CONTINUE. `names` are the callbacks' names in messages. `actions` and `options` are
    those that the milter has negotiated; it may use no others. `on_error` turns an exception of a
    callback, or an illegal return code, into a verdict; without it the exception is raised.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        actions: Actions,
        options: Protocol,
        call: Call,
        on_error: OnError | None = None,
    ) -> None:
        self.callbacks: Mapping[int, Callable[..., Any]] = {}
        self.milter: Any = None  # the object
        self.symbols = Symbols()
        self.symlists: dict[int, tuple[str, ...]] = {}  # from smfi_setsymlist
        self.changes = Changes()
        self.in_message = False
        self._names = names
        self._actions = actions
        self._options = options
        self._call = call
        self._on_error = on_error
        self._at = 0  # the letter of the callback that runs
        self._reply = ""  # from smfi_setreply
        self._verdict: bytes | None = None  # of the message, once it has one
        self._failed = False  # the last callback has raised
        self._skipping = False  # the milter wants no more of the body
        self._leading_space = False  # header values begin with the space after the colon
        self.is_closed = False  # close was called
        self._closed = False
        self._offer: commands.Negotiate | None = None
        self._agreed = commands.Negotiate(0, 0, 0)

    # Jobs

    def answer(
        self, stage: Stage | None, connection: bytes, message: bytes | memoryview
    ) -> bytes | Awaitable[bytes]:
        """Return the reply packets for the last of these packets, or an awaitable of them.

        Stage None ends the connection; the result is b"" then. Raise the exception of a callback,
        and InvalidVerdict for an illegal return code.
        """
        return run(self._process_packets(stage, connection, message))

    def _process_packets(
        self, stage: Stage | None, connection: bytes, message: bytes | memoryview
    ) -> Steps[bytes]:
        answer = _CONTINUE
        for part in (connection, message):
            for code, start, end in packets(part):
                if code == MACRO:
                    self.symbols.add(bytes(part[start:end]))
                elif code == NEGOTIATE:
                    yield from self._process_negotiation(bytes(part[start:end]))
                elif code == ABORT:
                    yield from self._abort_message()
                elif code != _REFUSED:
                    answer = yield from self._process_command(code, bytes(part[start:end]))
        if stage is None:
            yield from self._close()
            return b""
        return answer

    # Commands

    def _process_command(self, code: int, payload: bytes) -> Steps[bytes]:
        self.symbols.forget_later(code)
        if code in _MESSAGE:
            yield from self._begin_message(code)
            if self._verdict is not None:
                return self._repeat_verdict(code)
            if code == RCPT and self._is_hidden_recipient():
                return _CONTINUE
            if code == EOM:
                answer = yield from self._end_message(payload)
                return answer
        answer = yield from self._ask_callback(code, payload)
        return answer

    def _begin_message(self, code: int) -> Steps[None]:
        if code == commands.Mail.letter[0]:
            yield from self._abort_message()
        if not self.in_message and self._verdict is None:
            self._reset_message()
            self.in_message = True

    def _repeat_verdict(self, code: int) -> bytes:
        verdict = self._verdict
        assert verdict is not None
        if code == EOM:
            self._reset_message()
        return verdict

    def _is_hidden_recipient(self) -> bool:
        """Return True for a recipient that the MTA refuses, unless the milter negotiated those."""
        refused = self.symbols.get("{rcpt_mailer}") == "error"
        return refused and not self._options & Protocol.RCPT_REJ

    def _end_message(self, payload: bytes) -> Steps[bytes]:
        """Process end of message, which may have the last chunk of the body as its payload."""
        if payload:
            yield from self._ask_callback(BODY, payload)
            if self._verdict is not None:
                return self._repeat_verdict(EOM)
        self.in_message = False  # from here on `abort` must not be called
        code = yield from self._returned_code(EOM, ())
        answer = self._packet(code)
        if code in (ReturnCodes.CONTINUE, ReturnCodes.ACCEPT):
            answer = self.changes.packets() + answer
        self._reset_message()
        return answer

    def _ask_callback(self, command: int, payload: bytes) -> Steps[bytes]:
        """Call a callback before end of message, and return its reply."""
        if command == BODY and self._skipping:
            return _CONTINUE
        arguments = ARGUMENTS[command](payload)
        if command == _CODES[Stage.HEADER]:
            name, value = arguments
            arguments = name, self._without_space(value)
        code = yield from self._returned_code(command, arguments)
        if code is ReturnCodes.SKIP:
            self._skipping = True
            code = ReturnCodes.CONTINUE
        answer = self._packet(code)
        is_open = code is ReturnCodes.CONTINUE or code in _OPEN.get(command, ())
        if self._failed and self.has_no_reply(command):  # the MTA gets no verdict now
            is_open = code is ReturnCodes.CONTINUE
        if command in _MESSAGE and not is_open:
            self._verdict = answer
            self.in_message = False
        return answer

    def _without_space(self, value: str) -> str:
        if self._leading_space and not self._options & Protocol.HDR_LEADSPC:
            return value.removeprefix(" ")
        return value

    def _returned_code(self, command: int, arguments: tuple[Any, ...]) -> Steps[ReturnCodes]:
        """Return the callback's code, or that of `on_error` if it failed."""
        self._failed = False
        try:
            result = yield from self._call_callback(command, arguments)
            return self._check_code(command, result)
        except Exception as error:
            if self._on_error is None:
                raise
            self._failed = True
            return self._on_error(command, error)

    def _check_code(self, command: int, result: Any) -> ReturnCodes:
        code = _code_of(result)
        allowed = self._allowed(command)
        if code is None or code not in allowed:
            words = ", ".join(each.name for each in sorted(allowed))
            shown = repr(result)[:200] if code is None else code.name
            raise InvalidVerdict(f"{self._names[command]} returned {shown}; it may return {words}")
        return ReturnCodes.CONTINUE if code is ReturnCodes.NOREPLY else code

    def _allowed(self, command: int) -> frozenset[ReturnCodes]:
        if command not in _CONTENT and self.has_no_reply(command):
            return _UNANSWERED
        return VERDICTS[command]

    def has_no_reply(self, command: int) -> bool:
        """Return True if the milter has negotiated "no reply" for this command."""
        return bool(STAGES[command].no_reply & self._options)

    def _call_callback(self, command: int, arguments: tuple[Any, ...]) -> Steps[Any]:
        callback = self.callbacks.get(command)
        if callback is None:
            return ReturnCodes.CONTINUE
        with self.running(command):
            result = self._call(self._names[command], callback, arguments)
            if inspect.isawaitable(result):
                result = yield result
            return result

    def _notify(self, command: int, *arguments: Any) -> Steps[None]:
        """Call a callback that has no reply; its exception is only logged."""
        try:
            yield from self._call_callback(command, arguments)
        except Exception as error:
            if self._on_error is None:
                traceback.print_exception(error)
            else:
                self._on_error(command, error)

    def _packet(self, code: ReturnCodes) -> bytes:
        reply = self._reply
        if reply and _REPLY_CLASS.get(code) == reply[0]:
            self._reply = ""
            return replies.ReplyCode(reply).encode()
        return _PLAIN[code]

    # Ends of messages and connections

    def _abort_message(self) -> Steps[None]:
        """End the message; call `abort` unless it has ended already."""
        was_open, self.in_message = self.in_message, False
        self._reset_message()
        if was_open:
            yield from self._notify(ABORT)

    def _reset_message(self) -> None:
        self.in_message = False
        self._verdict = None
        self._skipping = False
        self.changes.clear()

    def _close(self) -> Steps[None]:
        if not self._closed:
            self._closed = True
            yield from self._abort_message()
            yield from self._notify(CLOSE)
            self.is_closed = True

    # Negotiation

    def _process_negotiation(self, payload: bytes) -> Steps[None]:
        """Process the MTA's offer, which comes first, or our reply, which says what was agreed."""
        words = commands.Negotiate.parse(payload)
        if self._offer is None:
            self._offer = words
            return
        self._agreed = words
        self.set_wanted(self._actions, self._options)
        yield from self._notify(NEGOTIATE, self._offer.actions, self._offer.protocol)

    def set_wanted(self, actions: Actions, options: Protocol) -> None:
        """Set what the milter negotiates on this connection; the MTA's reply may allow less."""
        self._actions, self._options = actions, options
        self._leading_space = bool(Protocol(self._agreed.protocol) & Protocol.HDR_LEADSPC)
        adds_space = self._leading_space and not options & Protocol.HDR_LEADSPC
        self.changes.granted = Actions(self._agreed.actions) & actions
        self.changes.space = " " if adds_space else ""

    # Calls of callbacks

    @contextmanager
    def running(self, command: int) -> Iterator[None]:
        """Mark the callback of `command` as running during the block."""
        self._at = command
        try:
            yield
        finally:
            self._at = 0

    def check_running(self, name: str, *commands: int) -> None:
        """Raise CallRefused unless one of these callbacks is running."""
        if self._at not in commands:
            where = self._names.get(self._at, "no callback")
            allowed = " or ".join(self._names[command] for command in commands)
            raise CallRefused(f"{name} is only allowed in {allowed}, not in {where}")

    def set_reply(self, text: str) -> None:
        """Set the SMTP reply lines of the next refusal with the same first digit."""
        self._reply = text
