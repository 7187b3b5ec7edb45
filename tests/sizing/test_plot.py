"""The curve has the given width, and bars in proportion to the rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.sizing.plot import curve

RATES = {1: 50.0, 2: 95.0, 4: 100.0, 16: 99.0}


def test_a_curve() -> None:
    assert curve(RATES, width=30, marked=2, ascii_only=False) == [
        " 1 ██████████▌            50",
        " 2 ████████████████████┊  95 ◀",
        " 4 █████████████████████ 100",
        "16 ████████████████████▊  99",
    ]


def test_a_curve_in_ascii() -> None:
    lines = curve({1: 5.0, 2: 8.0}, width=20, marked=2, ascii_only=True)
    assert lines == ["1 ########      5", "2 ############# 8 <-"]
    assert all(line.isascii() for line in lines)


def test_a_mark_shows_what_would_be_linear() -> None:
    flat = curve({1: 5.0, 2: 6.0, 4: 10.0}, width=30, marked=4, ascii_only=True)
    assert [line.count("|") for line in flat] == [0, 1, 0]


@given(
    st.dictionaries(st.integers(1, 999), st.floats(0, 1e5), min_size=1),
    st.integers(1, 200),
    st.booleans(),
)
def test_every_number_has_a_line_that_fits(
    rates: dict[int, float], width: int, ascii_only: bool
) -> None:
    marked = max(rates)
    lines = curve(rates, width=width, marked=marked, ascii_only=ascii_only)
    assert len(lines) == len(rates)
    assert all(len(line) <= max(width, 25) for line in lines)
    assert sum(line.endswith(("<-", "◀")) for line in lines) == 1


@pytest.mark.parametrize("ascii_only", [True, False])
def test_more_is_longer(ascii_only: bool) -> None:
    lines = curve({1: 1.0, 2: 2.0, 3: 3.0}, width=60, marked=1, ascii_only=ascii_only)
    lengths = [sum(line.count(mark) for mark in "#█") for line in lines]
    assert lengths == sorted(set(lengths))
