"""How many CPUs this process may really use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

OWN_CGROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")

# The unified hierarchy in a list of cgroups, and the files of a quota and its period in both.
V2 = "0"
V2_FILES = ("cpu.max",)
V1_FILES = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def usable_cpus(own: Path = OWN_CGROUPS, mount: Path = MOUNT) -> int:
    """The CPUs of this process's affinity mask, or fewer where a cgroup has a quota; at least 1.

    `own` is the list of the process's cgroups, `mount` where the system shows them.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, round(min([allowed or 1, *quotas(own, mount)])))


def quotas(own: Path, mount: Path) -> Iterator[float]:
    """The quotas, in CPUs, of the process's cgroups and of all those above them."""
    for line in _lines(own):
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == V2:
            yield from _written(_upwards(mount, path), V2_FILES)
        elif "cpu" in controllers.split(","):
            # Whatever else is mounted with it, the controller has its own name too.
            yield from _written(_upwards(mount / "cpu", path), V1_FILES)


def _lines(own: Path) -> list[str]:
    try:
        # A cgroup's name may hold any byte.
        lines = os.fsdecode(own.read_bytes()).split("\n")
    except OSError:
        lines = [f"{V2}::/"]  # without a /proc, at least what is at the top counts
    return [line for line in lines if line.count(":") >= 2]


def _upwards(mount: Path, path: str) -> list[Path]:
    """The folder of a cgroup and those above it; in a container only the mount may be there."""
    inside = PurePosixPath(path.lstrip("/"))
    if ".." in inside.parts:  # outside of what the mount shows
        return [mount]
    return [mount / each for each in (inside, *inside.parents)]


def _written(folders: list[Path], names: tuple[str, ...]) -> Iterator[float]:
    for folder in folders:
        try:
            words = " ".join((folder / name).read_text() for name in names).split()
            quota, period = map(int, words)
            if quota > 0:  # -1 is none
                yield quota / period
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
            continue
