"""A stand-in for `milter`, the C half of pymilter, on which pymilter's Python half runs unchanged.

A script registers its callbacks and calls main(), which calls `Registration.loop`. The program that
runs the script sets this function; it answers jobs with a `PymilterDialect` until the script or the
master stops it.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

from sharded_milter.dialects.pymilter.arguments import count, function_or_none, integer, text
from sharded_milter.dialects.pymilter.context import error
from sharded_milter.errors import MilterLoadError
from sharded_milter.protocol.negotiation import NO_REPLY_ALL
from sharded_milter.protocol.stages import Actions, Protocol, Stage

# pymilter's names of the callbacks, by the letter of the command.
NAMES = {
    ord("O"): "negotiate",
    ord("C"): "connect",
    ord("H"): "helo",
    ord("M"): "envfrom",
    ord("R"): "envrcpt",
    ord("T"): "data",
    ord("L"): "header",
    ord("N"): "eoh",
    ord("B"): "body",
    ord("E"): "eom",
    ord("A"): "abort",
    ord("Q"): "close",
    ord("U"): "unknown",
}
LETTERS = {name: letter for letter, name in NAMES.items()}

# The callbacks that have a function `set_NAME_callback`; the others are arguments of register().
_SET_ALONE = (
    "connect", "helo", "envfrom", "envrcpt", "header", "eoh", "body", "eom", "abort", "close",
)  # fmt: skip

# pymilter's names of the protocol bits of each stage.
_STAGE_WORDS = {
    Stage.CONNECT: ("NOCONNECT", "NR_CONN"),
    Stage.HELO: ("NOHELO", "NR_HELO"),
    Stage.MAIL: ("NOMAIL", "NR_MAIL"),
    Stage.RCPT: ("NORCPT", "NR_RCPT"),
    Stage.BODY: ("NOBODY", "NR_BODY"),
    Stage.HEADER: ("NOHDRS", "NR_HDR"),
    Stage.EOH: ("NOEOH", "NR_EOH"),
    Stage.UNKNOWN: ("NOUNKNOWN", "NR_UNKN"),
    Stage.DATA: ("NODATA", "NR_DATA"),
}

CONSTANTS: dict[str, int] = {
    "SUCCESS": 0,
    "FAILURE": -1,
    "VERSION": 0x1000001,
    "CONTINUE": 0,
    "REJECT": 1,
    "DISCARD": 2,
    "ACCEPT": 3,
    "TEMPFAIL": 4,
    "NOREPLY": 7,
    "SKIP": 8,
    "ALL_OPTS": 10,
    **{action.name: int(action) for action in Actions if action.name},
    "MODBODY": int(Actions.CHGBODY),
    "V1_ACTS": 0xF,
    "V2_ACTS": 0x3F,
    "CURR_ACTS": 0x1FF,
    "M_CONNECT": 0,
    "M_HELO": 1,
    "M_ENVFROM": 2,
    "M_ENVRCPT": 3,
    "M_DATA": 4,
    "M_EOM": 5,
    "M_EOH": 6,
    "P_SKIP": int(Protocol.SKIP),
    "P_RCPT_REJ": int(Protocol.RCPT_REJ),
    "P_HDR_LEADSPC": int(Protocol.HDR_LEADSPC),
    **{f"P_{no}": int(stage.suppress) for stage, (no, _) in _STAGE_WORDS.items()},
    **{f"P_{nr}": int(stage.no_reply) for stage, (_, nr) in _STAGE_WORDS.items()},
}

_VERSION = (1, 0, 1)  # libmilter's
_POLICIES = (0, 1, 3, 4)  # the codes that may answer for an exception
TEMPFAIL = 4

_SOCKET = re.compile(r"(?:(?P<kind>unix|local|inet6?|fd):)?(?P<place>.+)")


class Registration:
    """The settings and callbacks of a script, from its calls of the `milter` module."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Callable[..., Any]] = {}  # by letter
        self.name: str | None = None  # that of register()
        self.flags = 0
        self.policy = TEMPFAIL
        self.socket = ""  # from opensocket(), in the master's spelling
        self.made = self.deleted = 0  # contexts
        self.loop: Callable[[], None] = _no_loop  # answers jobs until `halt` is called
        self.halt: Callable[[], None] = lambda: None
        self._conn = ""
        self._running = self._over = False

    def module(self) -> ModuleType:
        """Return the module that a script imports as `milter`."""
        module = ModuleType("milter", "Stand-in for the C half of pymilter.")
        functions = [
            self.getdiag, self.getversion, self.main, self.opensocket, self.register,
            self.set_exception_policy, self.set_flags, self.setbacklog, self.setconn,
            self.setdbg, self.settimeout, self.stop,
        ]  # fmt: skip
        vars(module).update(CONSTANTS, error=error)
        vars(module).update((function.__name__, function) for function in functions)
        for name in _SET_ALONE:
            setattr(module, f"set_{name}_callback", self._setter(name))
        return module

    # Callbacks

    def _setter(self, name: str) -> Callable[..., Any]:
        def set_callback(*arguments: Any) -> Any:
            count(f"set_{name}_callback()", arguments, 1, 1)
            return self._set(name, function_or_none("callback", arguments[0]))

        set_callback.__name__ = f"set_{name}_callback"
        return set_callback

    def _set(self, name: str, function: Callable[..., Any] | None) -> Any:
        before = self.callbacks.pop(LETTERS[name], None)
        if function is not None:
            self.callbacks[LETTERS[name]] = function
        return before

    def register(self, *arguments: Any, **keywords: Any) -> None:
        """Set the milter's name, and three more callbacks."""
        parameters = ("name", "unknown", "data", "negotiate")
        for keyword in keywords:
            if keyword not in parameters:
                raise TypeError(f"{keyword!r} is an invalid keyword argument for register()")
        given = {**dict(zip(parameters, arguments, strict=False)), **keywords}
        if "name" not in given:
            raise TypeError("register() missing required argument 'name' (pos 1)")
        name = text("register()", 1, given["name"])
        # pymilter names the parameter before the one that is wrong.
        for called, parameter in pairwise(parameters):
            self._set(parameter, function_or_none(called, given.get(parameter)))
        self.name = name

    # Settings

    def set_flags(self, *arguments: Any) -> None:
        """Set the actions of a milter that has no negotiate callback."""
        self.flags = self._number("set_flags()", arguments)

    def set_exception_policy(self, *arguments: Any) -> None:
        """Set the verdict for a callback that raises."""
        policy = self._number("set_exception_policy()", arguments)
        if policy not in _POLICIES:
            raise error("invalid exception policy")
        self.policy = policy

    def settimeout(self, *arguments: Any) -> None:
        """Check the argument and ignore it: the master has its own deadlines."""
        self._number("settimeout()", arguments)

    def setbacklog(self, *arguments: Any) -> None:
        """Check the argument and ignore it: the master has its own backlog."""
        if self._number("setbacklog()", arguments) <= 0:
            raise error("cannot set backlog")

    def setdbg(self, *arguments: Any) -> None:
        """Check the argument and ignore it: there is no libmilter to debug."""
        self._number("setdbg()", arguments)

    def _number(self, function: str, arguments: tuple[Any, ...]) -> int:
        count(function, arguments, 1, 1)
        return integer(arguments[0])

    def setconn(self, *arguments: Any) -> None:
        """Set the socket, which the master opens unless --listen is given."""
        count("setconn()", arguments, 1, 1)
        conn = text("setconn()", 1, arguments[0])
        if not conn:
            raise error("cannot set connection")
        self._conn = conn

    def opensocket(self, *arguments: Any) -> None:
        """Check the spelling of the socket; raise `error` if it is malformed."""
        self._number("opensocket()", arguments)
        if not self.socket:
            self.socket = _spelled(self._conn)

    # Start and end

    def main(self, *arguments: Any) -> None:
        """Answer jobs until the milter stops."""
        count("main()", arguments, 0, 0)
        if self._running:
            raise error("milter module in use")
        if self._over:
            return
        if self.name is None:
            raise error("register() was not called")
        self._running = True
        try:
            self.loop()
        finally:
            self._running, self._over = False, True

    def stop(self, *arguments: Any) -> None:
        """Make main() return soon."""
        count("stop()", arguments, 0, 0)
        self.halt()

    def getversion(self, *arguments: Any) -> tuple[int, int, int]:
        """Return libmilter's version."""
        count("getversion()", arguments, 0, 0)
        return _VERSION

    def getdiag(self, *arguments: Any) -> tuple[int, int]:
        """Return how many contexts were made and deleted."""
        count("getdiag()", arguments, 0, 0)
        return self.made, self.deleted


def _no_loop() -> None:
    raise MilterLoadError("main() was called before the program has set a loop")


def _spelled(conn: str) -> str:
    """Return a socket in the master's spelling, with absolute paths and numeric ports.

    Raise `error` if it is malformed.
    """
    match = _SOCKET.fullmatch(conn)
    kind, place = (match["kind"], match["place"]) if match else (None, "")
    if kind == "fd":
        return conn
    if kind in ("inet", "inet6"):
        port, at, host = place.partition("@")
        try:
            number = int(port) if port.isdecimal() else socket.getservbyname(port, "tcp")
        except OSError:
            raise error("cannot opensocket") from None
        return f"{kind}:{number}{at}{host}"
    if not place or (kind is None and ":" in place):
        raise error("cannot opensocket")
    return f"unix:{os.path.abspath(place)}"


# "No reply" bits that libmilter always offers. If the MTA does not, libmilter sends CONTINUE.
FAKED = int(NO_REPLY_ALL) & 0x1FFFFF
