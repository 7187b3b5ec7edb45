"""The ways to run a milter, each with the daemon's arguments and the fields that it adds."""

from __future__ import annotations

from dataclasses import dataclass

from bench.chaos.daemon import MILTERS

_FUNCTIONS = f"{MILTERS}/chaos_functions.py:milter"
_OBJECTS = f"{MILTERS}/chaos_objects.py"


@dataclass(frozen=True)
class Kind:
    """A way to run a milter; `movable` says that a message survives the death of its worker."""

    arguments: tuple[str, ...]
    names: tuple[str, ...]
    movable: bool = True


KINDS = {
    "functions": Kind((_FUNCTIONS,), ("X-Functions",)),
    "replayable": Kind((f"{_OBJECTS}:Replayable",), ("X-Replayable",)),
    "plain": Kind((f"{_OBJECTS}:Plain",), ("X-Plain",), movable=False),
    "pymilter": Kind(
        ("--pymilter", f"{MILTERS}/chaos_pymilter.py"), ("X-Pymilter",), movable=False
    ),
    # On one connection: two in workers, and one in the master before one in a worker.
    "several": Kind((_FUNCTIONS, f"{_OBJECTS}:Second"), ("X-Functions", "X-Second")),
    "in-master": Kind(
        ("--in-master", _FUNCTIONS, f"{_OBJECTS}:Second"), ("X-Functions", "X-Second")
    ),
}
