"""A test of many cases fails with all that are wrong, and a case that raises nothing is one."""

from __future__ import annotations

import pytest
from cells import every, failing, rows


def check(number: int, other: int) -> None:
    """A docstring."""
    if number == 3:
        pytest.fail("three")
    if number == other:
        with pytest.raises(KeyError):
            pass
    assert number != 4
    if other == 0:
        raise KeyError(number / other)


def test_every_wrong_case_is_named() -> None:
    table = [(1, 2), (3, 2), (4, 5), (6, 6), (7, 0), (8, 1)]
    found = failing(check, table)
    assert [line.split(":")[0] for line in found] == ["(3, 2)", "(4, 5)", "(6, 6)", "(7, 0)"]
    assert [line.split(": ")[1] for line in found] == [
        "Failed", "AssertionError", "Failed", "ZeroDivisionError",
    ]  # fmt: skip
    with pytest.raises(pytest.fail.Exception, match=r"\(3, 2\): Failed: three"):
        rows(table)(check)()
    with pytest.raises(pytest.fail.Exception, match=r"\(3, 2\): Failed: three"):
        every([1, 3], [2])(check)()
    rows([(1, 2)])(check)()


def test_it_looks_like_the_check() -> None:
    made = every([1], [2])(check)
    assert (made.__name__, made.__doc__, made.__module__) == (
        "check", "A docstring.", check.__module__,
    )  # fmt: skip


def test_a_test_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="a test of nothing"):
        rows([])
