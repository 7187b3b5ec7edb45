"""Tests of many small cases as one test: hundreds of them cost more to manage than to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest

Check = Callable[..., None]


def every(*axes: Iterable[Any]) -> Callable[[Check], Callable[[], None]]:
    """Makes one test of a check: it is called with every combination of the axes' values."""
    return rows(product(*axes))


def rows(cases: Iterable[tuple[Any, ...]]) -> Callable[[Check], Callable[[], None]]:
    """Makes one test of a check: it is called with every row. All failures are shown, not one."""
    table = list(cases)
    if not table:
        raise ValueError("a test of nothing")

    def as_test(check: Check) -> Callable[[], None]:
        def test() -> None:
            found = failing(check, table)
            if found:
                pytest.fail(f"{len(found)} of {len(table)} cases:\n" + "\n".join(found))

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        test.__module__ = check.__module__
        return test

    return as_test


def failing(check: Check, table: Iterable[tuple[Any, ...]]) -> list[str]:
    """What is wrong with which row."""
    found = []
    for case in table:
        try:
            check(*case)
        except (Exception, pytest.fail.Exception) as error:
            found.append(f"{case!r:.200}: {type(error).__name__}: {error}")
    return found
