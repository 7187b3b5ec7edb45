"""Cells and rows of the transition tables of shards and generations."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class Cell(NamedTuple, Generic[S]):
    """The state after an event, and the name of the method that acts on it, or empty."""

    after: S
    act: str = ""


def row(events: type[E], stay: S, **cells: Cell[S]) -> Mapping[E, Cell[S]]:
    """Return the cells of a state by event; events that are not named change nothing."""
    named = {events[name]: cell for name, cell in cells.items()}
    return {event: named.get(event, Cell(stay)) for event in events}
