"""The tables of the state machines, as Markdown.

`python tests/tables.py` prints them; with `--write` they replace those of ARCHITECTURE.md, each
between two comments with its name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from sharded_milter.pool import generation, shard
from sharded_milter.protocol import session
from sharded_milter.protocol.commands import COMMANDS
from sharded_milter.protocol.stages import NO_PROTOCOL

ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def name(state: Enum) -> str:
    return f"`{state.name}`"


def session_table() -> str:
    """Return a row for each command in each state in which it is legal."""
    rows = (
        (
            name(state),
            f"{COMMANDS[letter].__name__} (`{chr(letter)}`)",
            name(cell.after),
            "" if cell.part is session.TranscriptPart.NONE else name(cell.part),
            "" if cell.ends is session.Scope.NONE else name(cell.ends),
            bits(cell.requires) if cell.may_ask else "milters are not asked",
        )
        for state, row in session.TRANSITIONS.items()
        for letter, cell in row.items()
    )
    return markdown(["state", "command", "next state", "stored in", "ends", "condition"], rows)


def bits(requires: Any) -> str:
    return "" if requires == NO_PROTOCOL else " ".join(f"`{bit.name}`" for bit in requires)


def machine_table(transitions: Mapping[Any, Mapping[Any, Any]]) -> str:
    """Return a row for each event in each state in which it changes or does something."""
    rows = (
        (name(state), name(event), name(cell.after), f"`{cell.act}`" if cell.act else "")
        for state, row in transitions.items()
        for event, cell in row.items()
        if cell.act or cell.after is not state
    )
    return markdown(["state", "event", "next state", "method"], rows)


def tables() -> dict[str, str]:
    """Return the table of each machine by its name."""
    return {
        "session": session_table(),
        "shard": machine_table(shard.TRANSITIONS),
        "generation": machine_table(generation.TRANSITIONS),
    }


def with_tables(text: str) -> str:
    """Return the document with the tables as the code has them; raise ValueError if one lacks."""
    for title, table in tables().items():
        text, count = re.subn(
            rf"(<!-- {title} -->\n).*?(<!-- end -->)",
            lambda found, table=table: found[1] + table + found[2],  # type: ignore[misc]
            text,
            flags=re.S,
        )
        if count != 1:
            raise ValueError(f"there are {count} places for the table of {title}")
    return text


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        ARCHITECTURE.write_text(with_tables(ARCHITECTURE.read_text()))
    else:
        print("\n".join(tables().values()))
