"""Rounds: who is measured when, and what ratios are made of."""

from __future__ import annotations

from bench.rounds import Rounds, alternating


def test_every_other_round_goes_backwards() -> None:
    order: list[str] = []

    def measure(side: str) -> int:
        order.append(side)
        return len(order)

    measured = alternating({"a": "A", "b": "B"}, 3, measure)
    assert order == ["A", "B", "B", "A", "A", "B"]
    assert measured == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_a_ratio_is_taken_round_by_round() -> None:
    ratio = Rounds([2.0, 9.0, 40.0]) / Rounds([1.0, 3.0, 4.0])
    assert (ratio.middle, ratio.spread) == (3.0, "2 to 10.0")
    assert (Rounds([3.0, 5.0]) - Rounds([1.0, 1.0])).middle == 3.0
