"""Rounds: each side in turn, so that a busy minute of the machine hits all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from sharded_milter.sizing.tables import cell

Side = TypeVar("Side")
T = TypeVar("T")


def alternating(
    sides: Mapping[str, Side], rounds: int, measure: Callable[[Side], T]
) -> dict[str, list[T]]:
    """What each round has measured, by the side's name; every other round goes backwards."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            results[name].append(measure(sides[name]))
    return results


@dataclass(frozen=True)
class Rounds:
    """A figure of each round."""

    values: Sequence[float]

    @property
    def middle(self) -> float:
        return median(self.values)

    @property
    def spread(self) -> str:
        """The least and the most."""
        return f"{cell(min(self.values))} to {cell(max(self.values))}"

    def __truediv__(self, other: Rounds) -> Rounds:
        """The ratio of two sides, round by round."""
        return Rounds([a / b for a, b in zip(self.values, other.values, strict=True)])

    def __sub__(self, other: Rounds) -> Rounds:
        """The difference of two sides, round by round."""
        return Rounds([a - b for a, b in zip(self.values, other.values, strict=True)])
