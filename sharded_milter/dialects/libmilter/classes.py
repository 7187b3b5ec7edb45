"""The classes dialect: a milter is an object with libmilter's callbacks, one for each connection.

All names are libmilter's, and its documentation applies (xxfi_* and smfi_*). All callbacks of a
connection run in one process, so attributes of the object live as long as the connection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum, IntEnum
from typing import Any, ClassVar, TypeAlias

from sharded_milter.dialects.libmilter.changes import Changes
from sharded_milter.dialects.libmilter.context import EOM, NEGOTIATE, Context, ReturnCodes
from sharded_milter.dialects.libmilter.reply import reply_lines
from sharded_milter.errors import CallRefused, InvalidValue
from sharded_milter.protocol.stages import Actions, Protocol, Stage

# The callbacks by the letter of the command that brings them.
NAMES = {
    ord("O"): "xxfi_negotiate",
    ord("C"): "xxfi_connect",
    ord("H"): "xxfi_helo",
    ord("M"): "xxfi_envfrom",
    ord("R"): "xxfi_envrcpt",
    ord("T"): "xxfi_data",
    ord("L"): "xxfi_header",
    ord("N"): "xxfi_eoh",
    ord("B"): "xxfi_body",
    ord("E"): "xxfi_eom",
    ord("A"): "xxfi_abort",
    ord("Q"): "xxfi_close",
    ord("U"): "xxfi_unknown",
}

# yatxmilter's names of callbacks, which would never be called here.
_OLD_NAMES = {
    "xxfi_env_from": "xxfi_envfrom",
    "xxfi_env_rcpt": "xxfi_envrcpt",
    "xxfi_mta_connect": "xxfi_negotiate, the first callback of a connection",
    "xxfi_mta_close": "xxfi_close",
}

Answer = ReturnCodes | Awaitable[ReturnCodes]
Negotiated = tuple[int, int] | list[Any] | ReturnCodes | None


class NetworkTypes(Enum):
    """The family of a client; the values are the protocol's letters."""

    UNKNOWN = "U"
    UNIX = "L"
    INET = "4"
    INET6 = "6"


# The class below has an attribute of that name.
Family: TypeAlias = NetworkTypes


class MacroStages(IntEnum):
    """The stages of smfi_setsymlist (SMFIM_*); in this numbering EOM is before EOH."""

    CONNECT = 0
    HELO = 1
    ENVFROM = 2
    ENVRCPT = 3
    DATA = 4
    EOM = 5
    EOH = 6


class Milter:
    """The milter of one connection: override the callbacks that you need; only they are called.

    A callback returns a `ReturnCodes` member, or a Deferred or coroutine of one; the next callback
    is called when that has a result. `protocol` is the connection's libmilter context, `factory`
    the factory that built the object. The smfi_ calls raise CallRefused where libmilter returns
    MI_FAILURE.

    `replayable = True` promises that the object can be rebuilt if its worker dies: in another
    process, by calling a new object's callbacks with the client and the current message again.
    Without it that message gets the operator's `--on-error` verdict, and the connection a new
    object. `sandbox = True` promises that the milter works in the sandbox, as in
    `sharded_milter.Milter`.
    """

    ReturnCodes = ReturnCodes
    NetworkTypes = NetworkTypes
    MacroStages = MacroStages
    NegotiateFlags = Protocol
    Actions = Actions

    replayable: ClassVar[bool] = False
    sandbox: ClassVar[bool] = False
    _context: Context

    def __init__(self, factory: Any = None, protocol: Any = None) -> None:
        self.factory = factory
        self.protocol = self._context = protocol

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name.startswith("xxfi_") and name not in NAMES.values():
                hint = f"; use {_OLD_NAMES[name]}" if name in _OLD_NAMES else ""
                raise InvalidValue(f"{cls.__name__}.{name} is not a callback of libmilter{hint}")

    # Callbacks

    def xxfi_negotiate(self, actions: int, protocol: int) -> Negotiated:
        """Return the SMFIF actions and SMFIP protocol bits that the milter needs.

        It is called once when the milter is loaded, with everything that an MTA can offer, and
        that result is used. It is called again for each object, with the offer of its MTA, and
        that result is ignored. This default takes all actions if `xxfi_eom` is overridden, and
        leaves out the stages that are not overridden. Returning None, CONTINUE or ALL_OPTS gives
        this default; yatxmilter's list of code, version, actions and protocol is accepted.
        """
        suppressed = sum(stage.suppress for stage in Stage if not self._overrides(stage.code))
        return (actions if self._overrides(EOM) else 0), suppressed & protocol

    def xxfi_connect(self, hostname: str, family: Family, address: Any) -> Answer:
        """Handle a new client; `address` is (IP address, port), a path, or None if unknown."""
        return ReturnCodes.CONTINUE

    def xxfi_helo(self, helohost: str) -> Answer:
        """Handle HELO or EHLO; it may come several times, or never."""
        return ReturnCodes.CONTINUE

    def xxfi_envfrom(self, argv: tuple[str, ...]) -> Answer:
        """Handle MAIL, which begins a message: the sender in the client's spelling, parameters."""
        return ReturnCodes.CONTINUE

    def xxfi_envrcpt(self, argv: tuple[str, ...]) -> Answer:
        """Handle RCPT, likewise. REJECT and TEMPFAIL refuse this recipient only."""
        return ReturnCodes.CONTINUE

    def xxfi_data(self) -> Answer:
        """Handle DATA."""
        return ReturnCodes.CONTINUE

    def xxfi_unknown(self, command: str) -> Answer:
        """Handle a command that the MTA does not know."""
        return ReturnCodes.CONTINUE

    def xxfi_header(self, name: str, value: str) -> Answer:
        """Handle a header field; `value` is folded with LF and lacks the space after the colon."""
        return ReturnCodes.CONTINUE

    def xxfi_eoh(self) -> Answer:
        """Handle the end of the header."""
        return ReturnCodes.CONTINUE

    def xxfi_body(self, chunk: bytes) -> Answer:
        """Handle a chunk of the body, of at most 65,535 bytes. Return SKIP to get no more."""
        return ReturnCodes.CONTINUE

    def xxfi_eom(self) -> Answer:
        """Handle the end of the message; only here the message can be changed."""
        return ReturnCodes.CONTINUE

    def xxfi_abort(self) -> Any:
        """Handle the end of a message without xxfi_eom and without a verdict of this object."""

    def xxfi_close(self) -> Any:
        """Handle the end of the connection; called once."""

    # Calls

    def smfi_getsymval(self, symname: str) -> str | None:
        """Return the value of a macro, or None. Braces around one character do not matter."""
        return self._context.symbols.get(symname)

    def smfi_setsymlist(self, stage: int, macros: str) -> None:
        """Request macros for a stage, in addition to the MTA's own; only in xxfi_negotiate."""
        self._context.check_running("smfi_setsymlist", NEGOTIATE)
        try:
            number = MacroStages(stage)
        except ValueError:
            raise CallRefused(f"smfi_setsymlist: {stage!r:.40} is not a stage") from None
        names = macros.replace(",", " ").split() if isinstance(macros, str) else []
        if not names:
            raise CallRefused(f"smfi_setsymlist: {macros!r:.80} has no macro names")
        if number in self._context.symlists:
            raise CallRefused(f"smfi_setsymlist: the macros of {number.name} are set already")
        self._context.symlists[number] = tuple(names)

    def smfi_setreply(self, rcode: str, xcode: str | None, message: str | None) -> None:
        """Set the reply code and text of this callback's REJECT (5dd) or TEMPFAIL (4dd)."""
        self._context.set_reply(reply_lines("smfi_setreply", rcode, xcode, [message or None]))

    def smfi_setmlreply(self, rcode: str, xcode: str | None, *lines: str) -> None:
        """Set a reply with several lines, at most 32."""
        self._context.set_reply(reply_lines("smfi_setmlreply", rcode, xcode, lines))

    def smfi_addheader(self, headerf: str, headerv: str) -> None:
        """Add a header field at a position that the MTA chooses."""
        self._change("smfi_addheader", Changes.add_header, headerf, headerv)

    def smfi_insheader(self, hdridx: int, headerf: str, headerv: str) -> None:
        """Insert a header field at an index; 0 is the top."""
        self._change("smfi_insheader", Changes.insert_header, hdridx, headerf, headerv)

    def smfi_chgheader(self, headerf: str, hdridx: int, headerv: str | None) -> None:
        """Change the hdridx-th field of that name, from 1; the value None or "" deletes it."""
        self._change("smfi_chgheader", Changes.change_header, headerf, hdridx, headerv)

    def smfi_chgfrom(self, mail: str, args: str | None = None) -> None:
        """Change the envelope sender; `args` are its ESMTP parameters in one string."""
        self._change("smfi_chgfrom", Changes.change_sender, mail, args)

    def smfi_addrcpt(self, rcpt: str) -> None:
        """Add a recipient."""
        self._change("smfi_addrcpt", Changes.add_recipient, rcpt)

    def smfi_addrcpt_par(self, rcpt: str, args: str | None = None) -> None:
        """Add a recipient with ESMTP parameters in one string."""
        self._change("smfi_addrcpt_par", Changes.add_recipient_with, rcpt, args)

    def smfi_delrcpt(self, rcpt: str) -> None:
        """Delete a recipient; use the client's spelling."""
        self._change("smfi_delrcpt", Changes.delete_recipient, rcpt)

    def smfi_replacebody(self, body: bytes) -> None:
        """Replace the body; further calls append to the new one. Line ends must be CRLF."""
        self._change("smfi_replacebody", Changes.replace_body, body)

    def smfi_quarantine(self, reason: str) -> None:
        """Hold the message for an administrator."""
        self._change("smfi_quarantine", Changes.quarantine, reason)

    def smfi_progress(self) -> None:
        """Do nothing: the master sends PROGRESS by itself."""
        self._context.check_running("smfi_progress", EOM)

    # Internals

    def _change(self, call: str, make: Callable[..., None], *arguments: Any) -> None:
        self._context.check_running(call, EOM)
        make(self._context.changes, call, *arguments)

    def _overrides(self, command: int) -> bool:
        """Return True if the author's class, or this object, has the callback of the command."""
        name = NAMES[command]
        return name in vars(self) or getattr(type(self), name) is not getattr(Milter, name)


class MilterFactory:
    """Builds an object of the class `milter` for each connection."""

    milter: type[Milter] = Milter

    def build_milter(self, protocol: Any) -> Milter:
        """Return a new object for the connection with the libmilter context `protocol`."""
        return self.milter(self, protocol)
