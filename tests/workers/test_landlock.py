"""What is asked of Landlock, by the version of its interface."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from sharded_milter.workers import landlock
from sharded_milter.workers.landlock import READ, WRITE, Right


class Kernel:
    """Takes the system calls instead of the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.version: int | OSError = 7
        self.rulesets: list[tuple[int, int, int]] = []
        self.rules: list[tuple[int, str]] = []
        self.flags: list[int] = []
        monkeypatch.setattr(landlock, "_call", self)

    def __call__(self, number: int, *arguments: int | bytes | None) -> int:
        if number == 444 and arguments[0] is None:
            if isinstance(self.version, OSError):
                raise self.version
            return self.version
        if number == 444:
            assert isinstance(arguments[0], bytes)
            self.rulesets.append(struct.unpack("=QQQ", arguments[0]))
            return os.open("/dev/null", os.O_RDONLY)
        if number == 445:
            assert isinstance(arguments[2], bytes)
            rights, fd = struct.unpack("=Qi", arguments[2])
            self.rules.append((rights, os.readlink(f"/proc/self/fd/{fd}")))
        else:
            assert isinstance(arguments[1], int)
            self.flags.append(arguments[1])
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


OLDEST = 0x1FFF


@pytest.mark.parametrize(
    ("version", "files", "tcp", "scopes", "flags"),
    [
        (1, OLDEST, 0, 0, 0),
        (2, OLDEST | Right.REFER, 0, 0, 0),
        (3, OLDEST | Right.REFER | Right.TRUNCATE, 0, 0, 0),
        (4, OLDEST | Right.REFER | Right.TRUNCATE, 3, 0, 0),
        (5, 0xFFFF, 3, 0, 0),
        (6, 0xFFFF, 3, 3, 0),
        (7, 0xFFFF, 3, 3, 1),
        (8, 0xFFFF, 3, 3, 9),
        (99, 0xFFFF, 3, 3, 9),
    ],
)
def test_each_right_is_asked_for_where_it_is_known(
    kernel: Kernel, version: int, files: int, tcp: int, scopes: int, flags: int
) -> None:
    landlock.restrict({}, version, network=False)
    assert kernel.rulesets == [(files, tcp, scopes)]
    assert kernel.flags == [flags]


def test_a_network_that_is_allowed_is_not_restricted(kernel: Kernel) -> None:
    landlock.restrict({}, 7, network=True)
    assert kernel.rulesets == [(0xFFFF, 0, 3)]


def test_a_file_gets_the_rights_of_files_and_what_is_not_there_none(
    kernel: Kernel, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    paths = {
        str(tmp_path): WRITE,
        str(tmp_path / "file"): WRITE,
        str(tmp_path / "none"): READ,
        str(tmp_path / "file" / "none"): READ,
    }
    landlock.restrict(paths, 2, network=False)
    assert kernel.rules == [
        (WRITE & ~Right.TRUNCATE, str(tmp_path)),
        (Right.READ_FILE | Right.WRITE_FILE, str(tmp_path / "file")),
    ]


def test_the_version_is_at_most_the_one_that_is_wanted(kernel: Kernel) -> None:
    assert (landlock.abi(), landlock.abi(2), landlock.abi(99)) == (7, 2, 7)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_kernel_without_it_has_version_0(kernel: Kernel, code: int) -> None:
    kernel.version = OSError(code, "no")
    assert landlock.abi() == landlock.abi(5) == 0


def test_what_the_kernel_refuses_is_an_error() -> None:
    with pytest.raises(OSError, match="Landlock: Bad file descriptor"):
        landlock._call(446, -1, 0)
