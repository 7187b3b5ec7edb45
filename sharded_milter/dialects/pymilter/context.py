"""The context object of pymilter's C half, with the calls that a callback may make.

Errors are those of pymilter 1.0.5 on libmilter, with two intended differences: text with bytes
that are not UTF-8 can be sent back, and values for which an MTA would close the connection are
corrected or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sharded_milter.dialects.libmilter.changes import Changes
from sharded_milter.dialects.libmilter.context import EOM, Context
from sharded_milter.dialects.libmilter.reply import reply_lines
from sharded_milter.dialects.pymilter.arguments import content, count, integer, text, text_or_none
from sharded_milter.errors import CallRefused
from sharded_milter.protocol.replies import MAX_REPLY_LINES
from sharded_milter.protocol.stages import SYMLIST_STAGES


class error(Exception):
    """A call that libmilter would refuse."""

    __module__ = "milter"


_LINE_BREAKS = re.compile(r"[\r\n]+")


class ContextObject:
    """The context of one connection, which the callbacks of a script get."""

    __slots__ = ("_context", "_private")

    def __init__(self, context: Context) -> None:
        self._context = context
        self._private: Any = None

    # Queries

    def getpriv(self, *arguments: Any) -> Any:
        """Return the object of the last setpriv(), or None."""
        count("getpriv()", arguments, 0, 0)
        return self._private

    def setpriv(self, *arguments: Any) -> Any:
        """Keep an object for getpriv(); return the one before."""
        count("setpriv()", arguments, 1, 1)
        before, self._private = self._private, arguments[0]
        return before

    def getsymval(self, *arguments: Any) -> str | None:
        """Return the value of a macro, or None."""
        count("getsymval()", arguments, 1, 1)
        name = text("getsymval()", 1, arguments[0])
        self._check_open()
        return self._context.symbols.get(name)

    # Replies and negotiation

    def setsymlist(self, *arguments: Any) -> None:
        """Request macros for a stage; only in negotiate, and once for each stage."""
        count("setsymlist()", arguments, 2, 2)
        stage = integer(arguments[0])
        macros = text("setsymlist()", 2, arguments[1])
        self._check_open()
        asked_for = self._context.symlists
        if stage not in SYMLIST_STAGES or stage in asked_for:
            raise error("cannot set macro list")
        asked_for[stage] = tuple(macros.replace(",", " ").split())

    def setreply(self, *arguments: Any) -> None:
        """Set the reply code and text of the next REJECT (5dd) or TEMPFAIL (4dd)."""
        count("setreply()", arguments, 2, 2 + MAX_REPLY_LINES)
        rcode = text("setreply()", 1, arguments[0])
        xcode = text_or_none("setreply()", 2, arguments[1])
        lines = [text("setreply()", n, line) for n, line in enumerate(arguments[2:], 3)]
        self._check_open()
        try:
            reply = reply_lines("", rcode, _enhanced(rcode, xcode, lines), lines or [None])
        except CallRefused as refused:
            raise error("cannot set reply") from refused
        self._context.set_reply(reply)

    def progress(self, *arguments: Any) -> None:
        """Do nothing: the master sends PROGRESS by itself."""
        count("progress()", arguments, 0, 0)
        self._check_open()

    # Changes, at end of message

    def addheader(self, *arguments: Any) -> None:
        """Add a header field at a position that the MTA chooses, or at an index from 0."""
        count("addheader()", arguments, 2, 3)
        name = text("addheader()", 1, arguments[0])
        value = text("addheader()", 2, arguments[1])
        place = integer(arguments[2]) if len(arguments) > 2 else -1
        if place < 0:
            self._change("cannot add header", Changes.add_header, name, value)
        else:
            self._change("cannot add header", Changes.insert_header, place, name, value)

    def chgheader(self, *arguments: Any) -> None:
        """Change the value of a header field, or delete the field."""
        count("chgheader()", arguments, 3, 3)
        name = text("chgheader()", 1, arguments[0])
        index = integer(arguments[1])
        value = text_or_none("chgheader()", 3, arguments[2])
        self._change("cannot change header", Changes.change_header, name, index, value)

    def addrcpt(self, *arguments: Any) -> None:
        """Add a recipient, optionally with ESMTP parameters."""
        count("addrcpt()", arguments, 1, 2)
        address, parameters = _address("addrcpt()", arguments)
        if parameters is None:
            self._change("cannot add recipient", Changes.add_recipient, address)
        else:
            self._change("cannot add recipient", Changes.add_recipient_with, address, parameters)

    def delrcpt(self, *arguments: Any) -> None:
        """Delete a recipient."""
        count("delrcpt()", arguments, 1, 1)
        address = text("delrcpt()", 1, arguments[0])
        self._change("cannot delete recipient", Changes.delete_recipient, address)

    def chgfrom(self, *arguments: Any) -> None:
        """Change the envelope sender, optionally with ESMTP parameters."""
        count("chgfrom()", arguments, 1, 2)
        address, parameters = _address("chgfrom()", arguments)
        self._change("cannot change sender", Changes.change_sender, address, parameters)

    def replacebody(self, *arguments: Any) -> None:
        """Replace the body; further calls append to the new one."""
        count("function", arguments, 1, 1)
        chunk = content(arguments[0])
        self._change("cannot replace message body", Changes.replace_body, chunk)

    def quarantine(self, *arguments: Any) -> None:
        """Hold the message."""
        count("quarantine()", arguments, 1, 1)
        reason = _LINE_BREAKS.sub(" ", text("quarantine()", 1, arguments[0]))
        self._change("cannot quarantine message", Changes.quarantine, reason)

    # Internals

    def _change(self, failure: str, make: Callable[..., None], *arguments: Any) -> None:
        self._check_open()
        try:
            self._context.check_running(failure, EOM)
            make(self._context.changes, failure, *arguments)
        except CallRefused as refused:
            raise error(failure) from refused

    def _check_open(self) -> None:
        """Raise `error` if the connection is over; a script may have kept this object."""
        if self._context.is_closed:
            raise error("bad context")


ContextObject.__name__ = ContextObject.__qualname__ = "Context"
ContextObject.__module__ = "milter"


def _address(function: str, arguments: tuple[Any, ...]) -> tuple[str, str | None]:
    address = text(function, 1, arguments[0])
    return address, text_or_none(function, 2, arguments[1] if len(arguments) > 1 else None)


def _enhanced(rcode: str, xcode: str | None, lines: list[str]) -> str | None:
    """Return an enhanced code that MTAs accept.

    If the enhanced code, or a text that begins with a digit, has another class than the reply code,
    Postfix treats the milter as broken.
    """
    if xcode == "":
        raise error("cannot set reply")
    if xcode is None:
        return f"{rcode[:1]}.0.0" if lines and lines[0][:1].isdigit() else None
    return rcode[:1] + xcode[1:] if re.match(r"[245]\.", xcode) else xcode
