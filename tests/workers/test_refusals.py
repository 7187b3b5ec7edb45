"""The option that would have allowed what the sandbox has refused."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharded_milter.workers import refusals
from sharded_milter.workers.refusals import MAX_CAUSES, hint

NOBODY_CAN_WRITE = Path("/proc/version")


@pytest.fixture(autouse=True)
def denied(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Files that the sandbox does not let be opened."""
    paths: set[str] = set()
    monkeypatch.setattr(refusals, "_opens", lambda path: path not in paths)
    return paths


def raised(act: Callable[[], object]) -> BaseException:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError


def raise_(error: BaseException) -> Any:
    raise error


def of(path: Path, code: int = errno.EACCES) -> BaseException:
    return raised(lambda: raise_(PermissionError(code, "no", str(path))))


def advice(option: str) -> str:
    return f"the sandbox has refused this; {option} would allow it"


def test_reading(tmp_path: Path, denied: set[str]) -> None:
    file = tmp_path / "list.txt"
    file.touch()
    denied |= {str(file), str(tmp_path)}
    assert hint(of(file), ()) == advice(f"--sandbox-read {file}")
    assert hint(of(tmp_path), ()) == advice(f"--sandbox-read {tmp_path}")


def test_writing(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    assert hint(of(file), ()) == advice(f"--sandbox-write {tmp_path}"), "it is to be made"
    file.touch()
    assert hint(of(file), ()) == advice(f"--sandbox-write {tmp_path}")
    assert hint(of(tmp_path, errno.EPERM), ()) == advice(f"--sandbox-write {tmp_path}")


def test_what_the_files_own_permissions_refuse_is_not_the_sandboxs(
    monkeypatch: pytest.MonkeyPatch, denied: set[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    denied.add("/etc/shadow")
    assert hint(of(Path("/etc/shadow")), ()) == ""
    assert hint(of(tmp_path / "new"), ()) == ""
    assert hint(of(Path("/no/such/folder/file")), ()) == ""


def test_an_odd_name_of_a_file_is_no_error() -> None:
    assert hint(PermissionError(errno.EACCES, "no", 3), ()) == ""


def no(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EPERM, "no")


@pytest.mark.parametrize("allowed", [(), ("network",)])
def test_sockets(monkeypatch: pytest.MonkeyPatch, allowed: tuple[str, ...]) -> None:
    expected = "" if allowed else advice("--sandbox-allow network")
    monkeypatch.setattr(socket, "socket", no)
    assert hint(raised(lambda: socket.create_connection(("127.0.0.1", 1))), allowed) == expected
    assert hint(socket.gaierror(-3, "no name"), allowed) == expected


@pytest.mark.parametrize("allowed", [(), ("subprocess",)])
def test_programs(monkeypatch: pytest.MonkeyPatch, allowed: tuple[str, ...]) -> None:
    expected = "" if allowed else advice("--sandbox-allow subprocess")
    monkeypatch.setattr(os, "fork", no)
    monkeypatch.setattr(subprocess, "Popen", no)
    assert hint(raised(lambda: os.fork()), allowed) == expected
    assert hint(raised(lambda: subprocess.run(["x"], check=True)), allowed) == expected


def test_a_program_that_is_named() -> None:
    def execv() -> None:
        raise PermissionError(errno.EPERM, "no", "/bin/sh")

    assert hint(raised(execv), ()) == advice("--sandbox-allow subprocess")


def test_modes_and_times_are_never_changed(tmp_path: Path) -> None:
    def chmod() -> None:
        raise PermissionError(errno.EPERM, "no", str(tmp_path))

    assert hint(raised(chmod), ()) == "the sandbox has refused this, and no option allows it"


def test_what_another_error_was_raised_from(tmp_path: Path) -> None:
    def act() -> None:
        try:
            raise PermissionError(errno.EACCES, "no", str(tmp_path / "new"))
        except PermissionError as error:
            try:
                raise KeyError("a") from error
            except KeyError:
                raise ValueError("b")  # noqa: B904

    assert hint(raised(act), ()) == advice(f"--sandbox-write {tmp_path}")


def test_other_errors_have_no_cure() -> None:
    assert hint(ValueError("x"), ()) == ""
    assert hint(raised(lambda: raise_(PermissionError(errno.EPERM, "no"))), ()) == ""
    error: BaseException = PermissionError(errno.EACCES, "no", "/tmp/x")
    for _ in range(MAX_CAUSES):
        error, before = ValueError("x"), error
        error.__cause__ = before
    assert hint(error, ()) == ""


def test_a_file_is_opened_to_see_whether_it_can_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    opens: Any = refusals.__dict__["_opens"]
    assert opens(str(tmp_path / "pipe"))
