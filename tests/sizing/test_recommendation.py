"""The recommended number of workers, the numbers to try, and the master's limit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.sizing.recommendation import TOLERANCE, MasterLimit, recommended, rising, sweep

RATES = st.dictionaries(st.integers(1, 128), st.floats(0, 1e6), min_size=1)


@pytest.mark.parametrize(
    ("rates", "workers"),
    [
        ({1: 50.0, 2: 95.0, 3: 100.0, 4: 99.0}, 2),
        ({1: 50.0, 2: 94.9, 3: 100.0, 4: 99.0}, 3),
        ({4: 100.0, 2: 100.0}, 2),
        ({1: 7.0}, 1),
        ({1: 100.0, 2: 60.0}, 1),
        ({1: 0.0, 2: 0.0}, 1),
    ],
)
def test_the_fewest_that_are_about_as_good(rates: dict[int, float], workers: int) -> None:
    assert recommended(rates) == workers


@given(RATES)
def test_none_smaller_would_do(rates: dict[int, float]) -> None:
    best, chosen = max(rates.values()), recommended(rates)
    assert rates[chosen] >= (1 - TOLERANCE) * best
    assert all(rate < (1 - TOLERANCE) * best for n, rate in rates.items() if n < chosen)


@pytest.mark.parametrize(
    ("cpus", "counts"),
    [
        (1, [1, 2]),
        (2, [1, 2, 3, 4]),
        (5, [1, 2, 3, 4, 5, 6, 8, 10]),
        (16, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]),
    ],
)
def test_what_is_tried(cpus: int, counts: list[int]) -> None:
    assert sweep(cpus) == counts


@given(st.integers(1, 1000))
def test_a_sweep_has_the_cpus_and_their_double_and_no_large_steps(cpus: int) -> None:
    counts = sweep(cpus)
    assert (counts[0], counts[-1], cpus in counts) == (1, 2 * cpus, True)
    assert all(after <= 2 * before for before, after in pairwise(counts))


def test_a_master_carries_what_its_core_does() -> None:
    assert MasterLimit.of(0.0005, 0.01) == MasterLimit(2000.0, 20.0)
    assert MasterLimit.of(0.0, 0.01) is None


@pytest.mark.parametrize(
    ("rates", "rises"),
    [
        ({1: 50.0, 2: 100.0, 4: 190.0}, True),
        ({1: 50.0, 2: 100.0, 4: 103.0}, False),
        ({1: 50.0, 2: 100.0, 4: 90.0}, False),
        ({4: 100.0}, False),
    ],
)
def test_a_curve_that_rises_to_its_end(rates: dict[int, float], rises: bool) -> None:
    assert rising(rates) is rises
