"""The daemon, which counts the calls of our functions. `bench/stations.py` runs it.

    python -P bench/counted_daemon.py FILE ARGUMENTS

ARGUMENTS are those of `sharded-milter`. On each MARK it writes to FILE, as JSON, what was called
since the MARK before, and begins again. The first MARK starts the counting, so nothing is counted
while the daemon starts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from types import CodeType, FrameType

from sharded_milter.cli import daemon

# The daemon itself uses no real-time signal.
MARK = signal.SIGRTMIN

PACKAGE = "sharded_milter"

# Since Python 3.12 most of these have no frame, so none of them is a call in any version.
_INLINE = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")

# A module and the name of a function in it.
Function = tuple[str, str]


class Calls:
    """A profile function: how often one function of ours has called another.

    The caller of a function is the innermost function of ours that was running. It is None where
    only others were, as when the reactor calls. Pairs are in the order of their first call.
    """

    def __init__(self) -> None:
        self.pairs: dict[tuple[Function | None, Function], int] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not _is_ours(frame):
            return
        above = frame.f_back
        while above is not None and not _is_ours(above):
            above = above.f_back
        pair = above and _named(above), _named(frame)
        self.pairs[pair] = self.pairs.get(pair, 0) + 1


def _is_ours(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return module.partition(".")[0] == PACKAGE and frame.f_code.co_name not in _INLINE


def _named(frame: FrameType) -> Function:
    code = frame.f_code
    name = f"{_class(frame, code)}.{code.co_name}" if _is_made(code) else code.co_qualname
    return str(frame.f_globals["__name__"]), name


def _is_made(code: CodeType) -> bool:
    """Whether it is a method that `dataclass` has made: its qualified name lacks the class."""
    return code.co_filename == "<string>" and code.co_argcount > 0


def _class(frame: FrameType, code: CodeType) -> str:
    return type(frame.f_locals[code.co_varnames[0]]).__qualname__


def main() -> None:
    path = sys.argv.pop(1)
    calls = Calls()

    def mark(*_: object) -> None:
        sys.setprofile(None)
        rows = [(caller, called, count) for (caller, called), count in calls.pairs.items()]
        calls.pairs.clear()
        with open(f"{path}.new", "w") as file:
            json.dump(rows, file)
        os.replace(f"{path}.new", path)  # a reader sees all of it or nothing
        sys.setprofile(calls)

    signal.signal(MARK, mark)
    daemon.main()


if __name__ == "__main__":
    main()
