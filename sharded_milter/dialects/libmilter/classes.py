"""The classes dialect: a milter is an object of libmilter's callbacks, from connect to close.

The names are libmilter's, the documentation of each call is libmilter's (xxfi_* and smfi_* at
milter.org). An object is asked in one place, so its attributes live as long as the connection.
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

# What yatxmilter called them; a class that still does would never be asked.
_OLD_NAMES = {
    "xxfi_env_from": "xxfi_envfrom",
    "xxfi_env_rcpt": "xxfi_envrcpt",
    "xxfi_mta_connect": "xxfi_negotiate, the first callback of a connection",
    "xxfi_mta_close": "xxfi_close",
}

Answer = ReturnCodes | Awaitable[ReturnCodes]
Negotiated = tuple[int, int] | list[Any] | ReturnCodes | None


class NetworkTypes(Enum):
    """The family of a client, by the letter that the wire has."""

    UNKNOWN = "U"
    UNIX = "L"
    INET = "4"
    INET6 = "6"


# The class below has an attribute of that name.
Family: TypeAlias = NetworkTypes


class MacroStages(IntEnum):
    """The stages of smfi_setsymlist (SMFIM_*); end of message comes before end of headers."""

    CONNECT = 0
    HELO = 1
    ENVFROM = 2
    ENVRCPT = 3
    DATA = 4
    EOM = 5
    EOH = 6


class Milter:
    """One connection's milter: override the callbacks that matter, and no others are asked for.

    A callback returns a `ReturnCodes` member, or a Deferred or coroutine of one; the next is
    called only when that has fired. `protocol` is the connection's libmilter context and
    `factory` who built the object. The smfi_ calls raise CallRefused where libmilter returns
    MI_FAILURE.

    `replayable = True` promises that the object may be rebuilt in another process, by being
    called again with what the MTA has said of the client and of the message in hand, when its
    worker dies. Else that message gets a temporary refusal, and the connection a new object.
    `sandbox = True` says that the milter works in the sandbox, as in `sharded_milter.Milter`.
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
                hint = f"; it is {_OLD_NAMES[name]} here" if name in _OLD_NAMES else ""
                raise InvalidValue(f"{cls.__name__}.{name} is no callback of libmilter{hint}")

    # Callbacks

    def xxfi_negotiate(self, actions: int, protocol: int) -> Negotiated:
        """What the milter needs of the MTA's offer: SMFIF actions and SMFIP protocol bits.

        Asked of one object when the milter is loaded, with all that an MTA can offer, and that
        answer counts; then of each object, with what its MTA offers, for its information. This
        default takes every action if it has `xxfi_eom`, and leaves out the stages that are not
        overridden. None, CONTINUE and ALL_OPTS mean this default too; yatxmilter's list of code,
        version, actions and protocol is understood.
        """
        suppressed = sum(stage.suppress for stage in Stage if not self._overrides(stage.code))
        return (actions if self._overrides(EOM) else 0), suppressed & protocol

    def xxfi_connect(self, hostname: str, family: Family, address: Any) -> Answer:
        """A client connected; `address` is (IP address, port), a path, or None if unknown."""
        return ReturnCodes.CONTINUE

    def xxfi_helo(self, helohost: str) -> Answer:
        """The client's greeting; it may come several times, or never."""
        return ReturnCodes.CONTINUE

    def xxfi_envfrom(self, argv: tuple[str, ...]) -> Answer:
        """A message begins: the sender as the client wrote it, and the ESMTP parameters."""
        return ReturnCodes.CONTINUE

    def xxfi_envrcpt(self, argv: tuple[str, ...]) -> Answer:
        """A recipient, likewise. REJECT and TEMPFAIL are of this recipient alone."""
        return ReturnCodes.CONTINUE

    def xxfi_data(self) -> Answer:
        """The client said DATA."""
        return ReturnCodes.CONTINUE

    def xxfi_unknown(self, command: str) -> Answer:
        """The client sent a command that the MTA does not know."""
        return ReturnCodes.CONTINUE

    def xxfi_header(self, name: str, value: str) -> Answer:
        """A header field; `value` is folded with LF, without the blank behind the colon."""
        return ReturnCodes.CONTINUE

    def xxfi_eoh(self) -> Answer:
        """The header is complete."""
        return ReturnCodes.CONTINUE

    def xxfi_body(self, chunk: bytes) -> Answer:
        """A piece of the body, at most 65,535 bytes, cut anywhere. SKIP: no more of them."""
        return ReturnCodes.CONTINUE

    def xxfi_eom(self) -> Answer:
        """The message is complete; the only place to change it."""
        return ReturnCodes.CONTINUE

    def xxfi_abort(self) -> Any:
        """The message is over without xxfi_eom and without a verdict of this object."""

    def xxfi_close(self) -> Any:
        """The connection is over; called once."""

    # What the milter may do

    def smfi_getsymval(self, symname: str) -> str | None:
        """The value of a macro, one letter with or without braces; None if there is none."""
        return self._context.symbols.get(symname)

    def smfi_setsymlist(self, stage: int, macros: str) -> None:
        """In xxfi_negotiate: macros wanted at a stage, besides those that the MTA sends anyway."""
        self._context.check_running("smfi_setsymlist", NEGOTIATE)
        try:
            number = MacroStages(stage)
        except ValueError:
            raise CallRefused(f"smfi_setsymlist: there is no stage {stage!r:.40}") from None
        names = macros.replace(",", " ").split() if isinstance(macros, str) else []
        if not names:
            raise CallRefused(f"smfi_setsymlist: {macros!r:.80} are no names of macros")
        if number in self._context.symlists:
            raise CallRefused(f"smfi_setsymlist: the macros of {number.name} are set already")
        self._context.symlists[number] = tuple(names)

    def smfi_setreply(self, rcode: str, xcode: str | None, message: str | None) -> None:
        """The words of this callback's REJECT (5dd) or TEMPFAIL (4dd)."""
        self._context.set_reply(reply_lines("smfi_setreply", rcode, xcode, [message or None]))

    def smfi_setmlreply(self, rcode: str, xcode: str | None, *lines: str) -> None:
        """The same with several lines, at most 32."""
        self._context.set_reply(reply_lines("smfi_setmlreply", rcode, xcode, lines))

    def smfi_addheader(self, headerf: str, headerv: str) -> None:
        """A new field; the MTA decides where."""
        self._change("smfi_addheader", Changes.add_header, headerf, headerv)

    def smfi_insheader(self, hdridx: int, headerf: str, headerv: str) -> None:
        """A new field at a place; 0 is the top."""
        self._change("smfi_insheader", Changes.insert_header, hdridx, headerf, headerv)

    def smfi_chgheader(self, headerf: str, hdridx: int, headerv: str | None) -> None:
        """Another value for the hdridx-th field of that name, from 1; None or "" deletes it."""
        self._change("smfi_chgheader", Changes.change_header, headerf, hdridx, headerv)

    def smfi_chgfrom(self, mail: str, args: str | None = None) -> None:
        """Another envelope sender, `args` being its ESMTP parameters in one string."""
        self._change("smfi_chgfrom", Changes.change_sender, mail, args)

    def smfi_addrcpt(self, rcpt: str) -> None:
        """A further recipient."""
        self._change("smfi_addrcpt", Changes.add_recipient, rcpt)

    def smfi_addrcpt_par(self, rcpt: str, args: str | None = None) -> None:
        """A further recipient with ESMTP parameters in one string."""
        self._change("smfi_addrcpt_par", Changes.add_recipient_with, rcpt, args)

    def smfi_delrcpt(self, rcpt: str) -> None:
        """One recipient less, spelled as the client did."""
        self._change("smfi_delrcpt", Changes.delete_recipient, rcpt)

    def smfi_replacebody(self, body: bytes) -> None:
        """Another body, or the next piece of it; line ends are CRLF."""
        self._change("smfi_replacebody", Changes.replace_body, body)

    def smfi_quarantine(self, reason: str) -> None:
        """The message is held for an operator."""
        self._change("smfi_quarantine", Changes.quarantine, reason)

    def smfi_progress(self) -> None:
        """Nothing to do: the MTA gets signs of life in any case."""
        self._context.check_running("smfi_progress", EOM)

    # Inside

    def _change(self, call: str, make: Callable[..., None], *arguments: Any) -> None:
        self._context.check_running(call, EOM)
        make(self._context.changes, call, *arguments)

    def _overrides(self, command: int) -> bool:
        """Whether the author's class, or this object, has the callback of the command."""
        name = NAMES[command]
        return name in vars(self) or getattr(type(self), name) is not getattr(Milter, name)


class MilterFactory:
    """Builds an object for each connection; `milter` is their class."""

    milter: type[Milter] = Milter

    def build_milter(self, protocol: Any) -> Milter:
        """A new object for the connection whose libmilter context is `protocol`."""
        return self.milter(self, protocol)
