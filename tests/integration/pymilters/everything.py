"""A pymilter script that tries everything everywhere and writes down what came of it.

`everything.py SOCKET RECORD [PLAN]`: each callback calls each method of the context in many ways,
also wrong ones, and appends one JSON line per call to RECORD: which callback, which method, its
arguments, and what it returned or raised. All values are written as `repr`, so that the file
tells `str` from `bytes`. The same file from another `milter` module must have the same lines.

PLAN is JSON:

- `calls`: the callbacks that try everything (default: all);
- `progress`: the callbacks that call progress() (default: eom only, since it goes out at once);
- `answers`: what a callback returns instead of CONTINUE, by callback: a name of pymilter, a Python
  literal, or `raise`; `replies`: the arguments of setreply() before that;
- `noreply`, `nocallback`: the callbacks with that decorator;
- `decode`: strategies by callback; `symlist`: macros by callback;
- `classes`: names of class decorators;
- `cases`: plans of single connections, by the client's host name, each over this one;
- `flags`, `policy`: for set_flags() and set_exception_policy(); `opts`: what negotiate() makes of
  its list; `module`: true to try the functions of the module, too; `omit`: callbacks to leave out.
"""

import ast
import json
import sys
import threading
from pathlib import Path

import Milter
import milter

# Written as pymilter scripts are: without annotations.
# mypy: ignore-errors

CALLBACKS = [
    "negotiate",
    "connect",
    "hello",
    "envfrom",
    "envrcpt",
    "data",
    "unknown",
    "header",
    "eoh",
    "body",
    "eom",
    "abort",
    "close",
]

LONG = "x" * 980
LINES = [f"line {number}" for number in range(1, 34)]

#: Through Milter.Base, which checks flags and percent signs before it asks the context.
BASE_CALLS = [
    *[("getsymval", (name,)) for name in ("i", "{i}", "j", "{j}", "{mail_addr}", "mail_addr")],
    *[("getsymval", (name,)) for name in ("{8bit}", "{none}", "none", "", "{", "é", None, b"i")],
    ("setreply", ("550", "5.7.1", "text")),
    ("setreply", ("451", "4.7.1", "text")),
    ("setreply", ("550", None, "text")),
    ("setreply", ("550", "", "text")),
    ("setreply", ("550", "5.7.1", "")),
    ("setreply", ("550", "5.7.1")),
    ("setreply", ("550",)),
    ("setreply", ("550", "5.7.1", None)),
    ("setreply", (None, None, "text")),
    ("setreply", (550, "5.7.1", "text")),
    ("setreply", ("", "5.7.1", "text")),
    ("setreply", ("250", "2.0.0", "text")),
    ("setreply", ("350", "3.0.0", "text")),
    ("setreply", ("650", "5.7.1", "text")),
    ("setreply", ("55", "5.7.1", "text")),
    ("setreply", ("5500", "5.7.1", "text")),
    ("setreply", ("5x0", "5.7.1", "text")),
    ("setreply", ("550", "4.7.1", "text")),
    ("setreply", ("450", "5.7.1", "text")),
    ("setreply", ("550", "2.7.1", "text")),
    ("setreply", ("550", "5.7", "text")),
    ("setreply", ("550", "5.777.1", "text")),
    ("setreply", ("550", "5.7777.1", "text")),
    ("setreply", ("550", "5.7.1 ", "text")),
    ("setreply", ("550", "five", "text")),
    ("setreply", ("550", "5.7.1", "100%% sure")),
    ("setreply", ("550", "5.7.1", "100% sure")),
    ("setreply", ("550", "5.7.1", "a\nb")),
    ("setreply", ("550", "5.7.1", "a\rb")),
    ("setreply", ("550", "5.7.1", "a\0b")),
    ("setreply", ("550", "5.7.1", "é")),
    ("setreply", ("550", "5.7.1", "\udce9")),
    ("setreply", ("550", "5.7.1", b"text")),
    ("setreply", ("550", "5.7.1", LONG)),
    ("setreply", ("550", "5.7.1", LONG + "x")),
    ("setreply", ("550", "5.7.1", "one", "two")),
    ("setreply", ("550", None, "one", "two")),
    ("setreply", ("550", "5.7.1", "one", "")),
    ("setreply", ("550", "5.7.1", "", "two")),
    ("setreply", ("550", "5.7.1", "one", None)),
    ("setreply", ("550", "5.7.1", "one", "t\nwo")),
    ("setreply", ("550", "5.7.1", "one", LONG)),
    ("setreply", ("550", "5.7.1", "one", LONG + "x")),
    ("setreply", ("550", "5.7.1", *LINES[:32])),
    ("setreply", ("550", "5.7.1", *LINES)),
    ("addheader", ("X-A", "appended")),
    ("addheader", ("X-B", "on top", 0)),
    ("addheader", ("X-C", "third", 2)),
    ("addheader", ("X-D", "last", 9999)),
    ("addheader", ("X-E", "negative", -7)),
    ("addheader", ("X-F", "two\n lines")),
    ("addheader", ("X-G", "two\r\n lines")),
    ("addheader", ("X-H", "two\nlines")),
    ("addheader", ("X-I", "")),
    ("addheader", ("X-J", " blank")),
    ("addheader", ("X-K", "é")),
    ("addheader", ("X-L", "\udce9")),
    ("addheader", ("X-M", "a\0b")),
    ("addheader", ("X-N", None)),
    ("addheader", ("X-O", b"bytes")),
    ("addheader", ("X-P", 5)),
    ("addheader", ("X Q:", "odd name")),
    ("addheader", ("é", "8-bit name")),
    ("addheader", ("", "no name")),
    ("addheader", (None, "None")),
    ("addheader", ("X-R", "float", 0.5)),
    ("addheader", ("X-S", "large", 2**31)),
    ("addheader", ("X-T", "None", None)),
    ("chgheader", ("Subject", 1, "changed")),
    ("chgheader", ("Subject", 1, "")),
    ("chgheader", ("Subject", 1, None)),
    ("chgheader", ("Subject", 0, "zero")),
    ("chgheader", ("Subject", -1, "minus")),
    ("chgheader", ("Subject", 2**31, "large")),
    ("chgheader", ("X-Other", 1, "two\r\n lines")),
    ("chgheader", ("X-Other", "1", "index")),
    ("chgheader", ("X-Other", 1, b"bytes")),
    ("chgheader", ("X-Other", 1, "é")),
    ("chgheader", ("", 1, "no name")),
    ("chgheader", (None, 1, "None")),
    ("addrcpt", ("<added@example.com>",)),
    ("addrcpt", ("added@example.com", None)),
    ("addrcpt", ("<added@example.com>", "NOTIFY=NEVER")),
    ("addrcpt", ("<added@example.com>", "")),
    ("addrcpt", ("<é@example.com>",)),
    ("addrcpt", ("\udce9@example.com",)),
    ("addrcpt", ("",)),
    ("addrcpt", (None,)),
    ("addrcpt", (b"<added@example.com>",)),
    ("addrcpt", ("<added@example.com>", ["NOTIFY=NEVER"])),
    ("delrcpt", ("<recipient@example.com>",)),
    ("delrcpt", ("",)),
    ("delrcpt", (None,)),
    ("delrcpt", (b"<recipient@example.com>",)),
    ("replacebody", ("text é\r\n",)),
    ("replacebody", (b"bytes \xff\0\r\n",)),
    ("replacebody", ("lines\nof LF\n",)),
    ("replacebody", ("",)),
    ("replacebody", (b"",)),
    ("replacebody", ("\udce9",)),
    ("replacebody", (None,)),
    ("replacebody", (bytearray(b"bytearray"),)),
    ("replacebody", (memoryview(b"memoryview"),)),
    ("replacebody", (b"y" * 65535,)),
    ("replacebody", (b"z" * 65536,)),
    ("replacebody", (b"w" * 140000,)),
    ("quarantine", ("a reason",)),
    ("quarantine", ("two\nlines",)),
    ("quarantine", ("two\r\nlines",)),
    ("quarantine", ("",)),
    ("quarantine", (None,)),
    ("quarantine", (b"bytes",)),
    ("chgfrom", ("<new@example.org>",)),
    ("chgfrom", ("<new@example.org>", "SIZE=10 BODY=8BITMIME")),
    ("chgfrom", ("<new@example.org>", "")),
    ("chgfrom", ("",)),
    ("chgfrom", (None,)),
    ("chgfrom", (b"<new@example.org>",)),
    ("setsymlist", (Milter.M_EOM, "{auth_type}", "i j")),
    ("setsymlist", (Milter.M_EOM, "{auth_type}")),
    ("setsymlist", (Milter.M_EOH, b"{auth_type}")),
    ("setsymlist", (Milter.M_DATA, "1", "2", "3", "4", "5", "6")),
    ("setsymlist", (Milter.M_CONNECT, "1 2 3 4 5 6")),
    ("setsymlist", (Milter.M_HELO, "")),
    ("setsymlist", (Milter.M_ENVRCPT,)),
    ("setsymlist", (Milter.M_ENVFROM, "é")),
    ("setsymlist", (7, "i")),
    ("setsymlist", (-1, "i")),
    ("setsymlist", ("connect", "i")),
    ("setsymlist", (Milter.M_DATA, None)),
]

#: At the context itself.
CONTEXT_CALLS = [
    ("getpriv", ()),
    ("getpriv", (1,)),
    ("setpriv", ()),
    ("getsymval", ()),
    ("getsymval", ("i", "j")),
    ("getsymval", ("a\0b",)),
    ("setreply", ("550",)),
    ("setreply", ("550", "5.7.1")),
    ("setreply", ("550", None)),
    ("setreply", ("550", "5.7.1", "100% sure")),
    ("setreply", ("550", "5.7.1", None)),
    ("setreply", ("550", "5.7.1", *LINES)),
    ("addheader", ("X-Context", "value")),
    ("addheader", ("X-Context",)),
    ("addheader", ("X-Context", "value", 0, 1)),
    ("chgheader", ("Subject", 1)),
    ("addrcpt", ()),
    ("delrcpt", ()),
    ("replacebody", ()),
    ("quarantine", ()),
    ("progress", (1,)),
    ("chgfrom", ()),
    ("setsymlist", (Milter.M_EOM,)),
    ("setsymlist", (Milter.M_EOM, b"i")),
    ("setsymlist", (Milter.M_EOM, "{auth_type} i")),
    ("setsymlist", (Milter.M_EOM, "again")),
    ("setsymlist", (Milter.M_EOH, "{auth_type},i")),
    ("setsymlist", (Milter.M_CONNECT, "1 2 3 4 5 6 7")),
    ("setsymlist", (Milter.M_HELO, "")),
    ("setsymlist", (Milter.M_ENVFROM, "é")),
    ("setsymlist", (7, "i")),
    ("setsymlist", (-1, "i")),
]

#: Before the script is registered; what would stop it from working afterwards is left out.
MODULE_CALLS = [
    *[("set_flags", (value,)) for value in (0, -1, 2**31, "1", None, 1.5)],
    *[("set_exception_policy", (value,)) for value in range(-1, 10)],
    *[("set_exception_policy", (value,)) for value in ("TEMPFAIL", None)],
    *[("settimeout", (value,)) for value in (0, -1, 2**31, "1", 7210)],
    *[("setbacklog", (value,)) for value in (0, -1, "1", 20)],
    *[("setdbg", (value,)) for value in (-1, "1", 0)],
    *[("setconn", (value,)) for value in ("", None, 5, b"unix:/x", "unix:", "nonsense:1")],
    *[("set_helo_callback", arguments) for arguments in ((1,), (), (None,))],
    ("register", ()),
    ("register", (None,)),
    ("register", ("x", 1)),
    ("opensocket", ("yes",)),
    ("opensocket", ()),
    ("main", (1,)),
    ("stop", (1,)),
    ("getversion", ()),
    ("getversion", (1,)),
    ("getdiag", ()),
]


class Record:
    """The file, one JSON line per call."""

    def __init__(self, path):
        self._path = path
        self._path.write_text("")
        self._lock = threading.Lock()

    def write(self, callback, method, arguments, outcome):
        line = {
            "callback": callback,
            "method": method,
            "arguments": [short(argument) for argument in arguments],
            **outcome,
        }
        with self._lock, self._path.open("a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")

    def call(self, callback, method, function, arguments):
        try:
            outcome = {"returned": short(function(*arguments))}
        except Exception as error:
            outcome = {"raised": type(error).__name__, "text": str(error)}
        self.write(callback, method, arguments, outcome)


def short(value):
    """The repr, without the middle of long ones and without addresses in memory."""
    text = repr(value)
    if " at 0x" in text:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 1100 else f"{text[:40]}...{len(value)}"


class Everything(Milter.Base):
    """Its callbacks are made from the plan."""

    plan: dict
    record: Record

    def attempt(self, callback):
        if callback in self.plan.get("calls", CALLBACKS):
            for method, arguments in BASE_CALLS:
                self.record.call(callback, method, getattr(self, method), arguments)
            for method, arguments in CONTEXT_CALLS:
                function = getattr(self._ctx, method)
                self.record.call(callback, f"ctx.{method}", function, arguments)
        if callback in self.plan.get("progress", ["eom"]):
            self.record.call(callback, "progress", self.progress, ())

    def answer(self, callback):
        for reply in self.plan.get("replies", {}).get(callback, []):
            self.record.call(callback, "setreply", self.setreply, reply)
        said = self.plan.get("answers", {}).get(callback, "CONTINUE")
        if said == "raise":
            raise ZeroDivisionError(f"in {callback}")
        return getattr(Milter, said) if hasattr(Milter, said) else ast.literal_eval(said)

    def negotiate(self, opts):
        self.record.write("negotiate", "called", (list(opts),), {})
        self.attempt("negotiate")
        verdict = super().negotiate(opts)
        for index, value in enumerate(self.plan.get("opts", [])):
            if value is not None:
                opts[index] = value
        self.record.write("negotiate", "opts", (list(opts),), {"returned": short(verdict)})
        answers = self.plan.get("answers", {})
        return self.answer("negotiate") if "negotiate" in answers else verdict


def callback_method(name):
    def method(self, *arguments):
        if name == "connect":
            self.plan = {**self.plan, **self.plan.get("cases", {}).get(arguments[0], {})}
        state = {"protocol": hex(self._protocol), "actions": hex(self._actions)}
        self.record.write(name, "called", arguments, state if name == "connect" else {})
        self.attempt(name)
        return self.answer(name)

    method.__name__ = name
    return method


def build(plan, record):
    """The class that the plan describes."""
    members = {"plan": plan, "record": record}
    for name in CALLBACKS[1:]:
        if name in plan.get("omit", []):
            continue
        method = callback_method(name)
        if name in plan.get("decode", {}):
            method = Milter.decode(plan["decode"][name])(method)
        if name in plan.get("symlist", {}):
            method = Milter.symlist(*plan["symlist"][name])(method)
        if name in plan.get("noreply", []):
            method = Milter.noreply(method)
        if name in plan.get("nocallback", []):
            method = Milter.nocallback(method)
        members[name] = method
    klass = type("Everything", (Everything,), members)
    for name in plan.get("classes", []):
        klass = getattr(Milter, name)(klass)
    return klass


def main():
    socket, path, *rest = sys.argv[1:]
    plan = json.loads(rest[0]) if rest else {}
    record = Record(Path(path))
    if plan.get("module"):
        for name, arguments in MODULE_CALLS:
            record.call("module", name, getattr(milter, name), arguments)
        milter.set_exception_policy(Milter.TEMPFAIL)
    Milter.set_flags(plan.get("flags", Milter.CURR_ACTS))
    if "policy" in plan:
        Milter.set_exception_policy(getattr(Milter, plan["policy"]))
    Milter.factory = build(plan, record)
    record.call("module", "runmilter", Milter.runmilter, ("everything", socket, 60))


if __name__ == "__main__":
    main()
