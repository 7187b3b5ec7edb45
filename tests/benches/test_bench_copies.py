"""What is counted of copies, seen in processes whose copies are known."""

from __future__ import annotations

import pytest

from bench import copy_floors
from bench.copies import Used, floor

SIZE = 4_000_000


@pytest.mark.parametrize(
    ("work", "written"),
    [
        (copy_floors.fresh, 1),
        (copy_floors.again, 1),
        (copy_floors.straight, 0),
        (copy_floors.look, 0),
        (copy_floors.copy, 0),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_floor_writes_what_it_says(work: copy_floors.Floor, written: int) -> None:
    with floor(work, SIZE) as measure:
        [used] = measure(3)
    assert used.written == pytest.approx(written, abs=0.001)
    assert used.read == pytest.approx(0, abs=0.001)


def test_what_was_used_is_that_of_each_byte() -> None:
    before, after = Used(1, 2, 3, 4, 5), Used(2, 4, 6, 8, 10)
    used = after.since(before, 1_000_000)
    assert used == Used(1e-6, 2e-6, 3e-6, 4e-6, 5e-6)
    assert used.ms_a_mb == pytest.approx(3000)
