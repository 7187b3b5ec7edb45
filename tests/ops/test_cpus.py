"""How many CPUs this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sharded_milter.ops.cpus import usable_cpus


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000", 8),
        ("800000 100000", 8),
        ("1600000 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("260000 100000", 3),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("", 8),
        ("nonsense", 8),
        ("100000 0", 8),
    ],
)
def test_a_cgroups_quota_counts(
    quota: str, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cpus(tmp_path / "cpu.max") == cpus


def test_without_a_cgroup_the_affinity_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert usable_cpus(tmp_path / "none") == 3


@pytest.mark.parametrize(("count", "cpus"), [(6, 6), (None, 1)])
def test_where_there_is_no_affinity_all_cpus_count(
    count: int | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert usable_cpus(tmp_path / "none") == cpus
