"""The number of CPUs that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sharded_milter.ops.cpus import usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the affinity mask of these tests."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def counted(root: Path, own: str, **files: str) -> int:
    """Return the CPUs for a process with these cgroups and files below the mount."""
    (root / "own").write_text(own)
    for name, content in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return usable_cpus(root / "own", root / "mount")


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
def test_a_cgroups_quota_counts(quota: str, cpus: int, tmp_path: Path) -> None:
    assert counted(tmp_path, "0::/\n", **{"cpu.max": quota}) == cpus


UNIT = "0::/system.slice/milter.service\n"


@pytest.mark.parametrize(
    ("top", "middle", "bottom", "cpus"),
    [
        ("max 100000", "max 100000", "300000 100000", 3),  # systemd's CPUQuota
        ("max 100000", "200000 100000", "300000 100000", 2),
        ("100000 100000", "200000 100000", "300000 100000", 1),
        ("max 100000", "150000 50000", "max 100000", 3),
        ("max 100000", "max 100000", "max 100000", 8),
    ],
)
def test_the_smallest_quota_of_the_own_cgroup_and_those_above_counts(
    top: str, middle: str, bottom: str, cpus: int, tmp_path: Path
) -> None:
    files = {
        "cpu.max": top,
        "system.slice/cpu.max": middle,
        "system.slice/milter.service/cpu.max": bottom,
        "system.slice/other.service/cpu.max": "100000 100000",
    }
    assert counted(tmp_path, UNIT, **files) == cpus


def test_a_cgroup_that_the_mount_does_not_show_has_the_mounts_quota(tmp_path: Path) -> None:
    files = {"cpu.max": "200000 100000", "other/cpu.max": "100000 100000"}
    assert counted(tmp_path, "0::/docker/0123\n", **files) == 2
    assert counted(tmp_path, "0::/../other\n", **files) == 2


@pytest.mark.parametrize(("quota", "cpus"), [("200000", 2), ("-1", 8), ("", 8)])
def test_the_first_versions_cgroups_count_too(quota: str, cpus: int, tmp_path: Path) -> None:
    own = "5:memory:/small\n4:cpu,cpuacct:/system.slice/milter.service\n1:name=systemd:/\n0::/\n"
    files = {
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "cpu/system.slice/milter.service/cpu.cfs_quota_us": f"{quota}\n",
        "cpu/system.slice/milter.service/cpu.cfs_period_us": "100000\n",
        "cpu/small/cpu.cfs_quota_us": "100000\n",
        "cpu/small/cpu.cfs_period_us": "100000\n",
    }
    assert counted(tmp_path, own, **files) == cpus


@pytest.mark.parametrize("own", ["", "nonsense\n", "0::/nowhere\n", "0::/\udcff (deleted)\n"])
def test_without_a_quota_the_affinity_counts(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    (tmp_path / "own").write_bytes(os.fsencode(own))
    assert usable_cpus(tmp_path / "own", tmp_path / "mount") == 3


def test_without_a_list_of_cgroups_the_topmost_quota_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("200000 100000")
    assert usable_cpus(tmp_path / "own", tmp_path) == 2


@pytest.mark.parametrize(("count", "cpus"), [(6, 6), (None, 1)])
def test_where_there_is_no_affinity_all_cpus_count(
    count: int | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert usable_cpus(tmp_path / "none", tmp_path) == cpus
