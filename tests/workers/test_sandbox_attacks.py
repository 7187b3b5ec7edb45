"""From inside a sandboxed process nothing that is tried against others succeeds."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel import required
from ordinary import as_ordinary_user, ordinary_folder

from sharded_milter.workers import landlock

ATTACKS = Path(__file__).with_name("attacks.py")

#: What the kernel, or our filter, says to what is not allowed.
REFUSED = {"EPERM", "EACCES"}

#: Errors of another name that follow from a refusal: Python has tried all folders, the C library
#: is to use an older call.
CONSEQUENCES = {
    "make a temporary file": "ENOENT",
    "clone3": "ENOSYS",
    "openat2": "ENOSYS",
}

#: Attempts that succeed without a sandbox, so that their failure in one says something.
POSSIBLE = (
    "read a file", "list a folder", "read /etc/passwd", "read the victim's command",
    "list processes", "write the milter's file", "truncate by reading", "make a file",
    "make a temporary file", "change a file's mode", "change a file's mode by descriptor",
    "change a file's times", "link a file", "link a file softly", "steer itself by /proc", "fork",
    "run a program", "kill the victim", "see whether the victim lives",
    "kill a thread of the victim", "have a pipe send a signal to the victim",
    "read the victim's limits", "take priority", "be dumpable again", "IPv4", "UNIX socket",
    "abstract UNIX socket", "netlink", "datagram from a pair", "pair of sequenced packets",
    "remove a file", "rename a file",
)  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    with ordinary_folder() as folder:
        for name in ("secret", "milter/milter.py", "milter/other"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("# nothing\n")
        if not os.getuid():
            for path in folder.rglob("*"):
                os.chown(path, folder.stat().st_uid, folder.stat().st_gid)
        yield folder


def attacked(folder: Path, *names: str, **sandbox: Any) -> dict[str, Any]:
    """What came of the attacks of an ordinary user."""
    command = [*as_ordinary_user(), sys.executable, str(ATTACKS), str(folder)]
    run = subprocess.run(
        [*command, json.dumps(sandbox), *names],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        cwd="/",
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def succeeded(found: dict[str, str]) -> dict[str, str]:
    return {
        name: error
        for name, error in found.items()
        if error not in REFUSED and error != CONSEQUENCES.get(name)
    }


@functools.cache
def versions() -> list[int]:
    """Of Landlock's interface, the kernel's own included."""
    return list(range(1, landlock.abi() + 1)) or [0]


@pytest.mark.parametrize("version", versions())
def test_every_attack_fails(folder: Path, version: int) -> None:
    required()
    result = attacked(folder, mode="on", max_abi=version)
    assert result["report"] == f"workers are sandboxed, with Landlock {version}"
    assert succeeded(result["found"]) == {}
    assert {name: error for name, error in result["kept"].items() if error != "done"} == {}


def test_without_a_sandbox_these_succeed(folder: Path) -> None:
    result = attacked(folder, *POSSIBLE, mode="off")
    assert result["found"] == dict.fromkeys(POSSIBLE, "done")


def test_without_landlock_no_file_is_changed_and_no_process_reached(folder: Path) -> None:
    """A kernel that has none; `auto` goes on."""
    required()
    result = attacked(folder, mode="auto", max_abi=0)
    assert result["report"].startswith("workers are sandboxed without Landlock (")
    readable = {
        *("read a file", "list a folder", "read /etc/passwd", "list processes"),
        "read the victim's command",
        # Only of the user of these tests where Python lies in root's home; see `ordinary`.
        "list the victim's descriptors",
    }
    assert set(succeeded(result["found"])) <= readable


def test_what_is_allowed_works_and_nothing_else(folder: Path) -> None:
    required()
    paths = {"read": [f"{folder}/secret"], "write": [f"{folder}/milter"]}
    result = attacked(folder, mode="on", allow=["network", "subprocess"], **paths)
    wanted = {
        *("read a file", "write the milter's file", "link a file"),
        *("remove a file", "rename a file", "fork", "run a program"),
        *("IPv4", "IPv6"),
    }
    found = succeeded(result["found"])
    assert wanted <= {name for name, error in found.items() if error == "done"}
    others = {name for name in found if not name.startswith("call ")} - wanted
    # The kernel says that it has signalled everybody though it has refused each of them.
    assert others <= {"run a program from memory", "kill everybody"}
