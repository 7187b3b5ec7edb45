"""Count the CPUs that this process may use, with the quotas of its cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

OWN_CGROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")

# The number of the unified hierarchy (cgroup v2) in /proc/self/cgroup, and the files with a quota
# and its period in v2 and v1.
V2 = "0"
V2_FILES = ("cpu.max",)
V1_FILES = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def usable_cpus(own: Path = OWN_CGROUPS, mount: Path = MOUNT) -> int:
    """Return the number of CPUs in the affinity mask, or a smaller cgroup quota; at least 1.

    `own` is the file with the process's cgroups, `mount` the folder of the cgroup file system.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, round(min([allowed or 1, *quotas(own, mount)])))


def quotas(own: Path, mount: Path) -> Iterator[float]:
    """Yield the quotas, in CPUs, of the process's cgroups and of all their parents."""
    for line in _lines(own):
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == V2:
            yield from _written(_upwards(mount, path), V2_FILES)
        elif "cpu" in controllers.split(","):
            # The controller may be mounted together with others; "cpu" is a link to it then.
            yield from _written(_upwards(mount / "cpu", path), V1_FILES)


def _lines(own: Path) -> list[str]:
    try:
        # A cgroup's name may hold any byte.
        lines = os.fsdecode(own.read_bytes()).split("\n")
    except OSError:
        lines = [f"{V2}::/"]  # no /proc: read at least the quota of the root cgroup
    return [line for line in lines if line.count(":") >= 2]


def _upwards(mount: Path, path: str) -> list[Path]:
    """Return the folders of a cgroup and its parents; in a container only the last may exist."""
    inside = PurePosixPath(path.lstrip("/"))
    if ".." in inside.parts:  # the cgroup is outside of the mount
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
