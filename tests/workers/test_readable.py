"""What a sandboxed worker may read: what it runs, and nothing that is hidden."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from sharded_milter.workers.readable import is_wide, readable


def covered(path: Path | str, found: list[str]) -> bool:
    """Whether a right for what was found is one for the path."""
    real = os.path.realpath(path)
    return any(real == each or real.startswith(f"{each}/") for each in found)


@pytest.fixture
def milter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its folder has data, a folder of kept mails with another beside it, and links outside."""
    for name in ("m/milter.py", "m/model.bin", "m/run/keep/a.eml", "m/run/lists/a", "outside/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "m/link").symlink_to(tmp_path / "outside")
    monkeypatch.chdir(tmp_path / "outside")
    return tmp_path / "m" / "milter.py"


def test_python_its_libraries_and_the_milters_folder(milter: Path) -> None:
    found = readable([str(milter)], [])
    for path in (
        os.__file__,
        pytest.__file__,
        __file__,
        milter.parent,
        "/usr/share",
        "/etc/localtime",
    ):
        assert covered(path, found) or not os.path.exists(path), path
    for path in ("/etc/passwd", "/root", "/home", "/var/spool", milter.parent.parent / "outside"):
        assert not covered(path, found), path


def test_nothing_hidden_is_among_it_and_all_beside_it_is(milter: Path) -> None:
    folder = milter.parent
    hidden = [str(folder / "run/keep"), str(folder / "s"), "/usr/lib"]
    found = readable([str(milter)], hidden)
    assert not covered(folder / "run/keep/a.eml", found)
    assert not covered(folder, found)
    assert not covered(folder / "run", found)
    assert not covered(folder / "link", found), "it leads outside"
    assert not covered("/usr/lib/os-release", found)
    assert covered("/usr/share", found)
    for name in ("milter.py", "model.bin"):
        assert covered(folder / name, found) or name == "s"
    assert covered(folder / "run/lists/a", readable([str(milter)], [str(folder / "run/keep")]))


def test_of_a_hidden_folder_only_a_milter_that_lies_below_it(milter: Path) -> None:
    (milter.parent / "sub").mkdir()
    for name in ("other.py", "sub/data"):
        (milter.parent / name).write_text("x")
    found = readable([str(milter)], [str(milter.parent.parent)])
    assert covered(milter, found)
    for name in ("other.py", "sub/data", "model.bin", "run/keep/a.eml"):
        assert not covered(milter.parent / name, found), name


def test_a_link_to_the_milter_is_followed(milter: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").symlink_to(milter)
    found = readable([str(tmp_path / "other.py")], [])
    assert covered(milter.parent / "model.bin", found)
    assert not covered(tmp_path / "outside", found)


def test_the_current_directory_only_if_a_milter_is_there(
    milter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(milter.parent.parent / "outside"))
    assert not covered("b", readable([str(milter)], []))
    monkeypatch.chdir(milter.parent.parent)
    monkeypatch.syspath_prepend(str(milter.parent.parent))
    assert covered("outside/b", readable([str(milter)], []))


def test_packages_from_elsewhere(
    milter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, module, odd = (types.ModuleType(name) for name in ("package", "module", "odd"))
    package.__path__ = [str(tmp_path / "package")]
    module.__file__ = str(tmp_path / "module.py")
    odd.__path__ = 3  # type: ignore[assignment]
    for each in (package, module, odd):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    found = readable([str(milter)], [])
    assert covered(tmp_path / "package", found)
    assert covered(tmp_path / "module.py", found)
    assert not covered(tmp_path, found)


@pytest.mark.parametrize(
    ("folder", "wide"),
    [
        ("/", True), ("/etc", True), ("/home", True), ("/home/alice", True), ("/srv", True),
        ("/home/alice/milters", False), ("/srv/spam", False), ("/usr", False), ("/lib64", False),
    ],
)  # fmt: skip
def test_what_is_too_wide(folder: str, wide: bool) -> None:
    assert is_wide(folder) is wide


def test_of_a_folder_that_is_too_wide_only_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("milter.py", "helper.py", "package/__init__.py", "private/key", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(
        "sharded_milter.workers.readable.is_wide", lambda folder: folder == str(tmp_path)
    )
    hidden = tmp_path / "package" / "keep"
    hidden.mkdir()
    beside = readable([str(tmp_path / "milter.py")], [str(hidden)])
    assert covered(tmp_path / "package/__init__.py", beside)
    assert not covered(hidden, beside)
    hidden.rmdir()
    found = readable([str(tmp_path / "milter.py")], [])
    for name in ("milter.py", "helper.py", "package"):
        assert covered(tmp_path / name, found), name
    for name in ("private/key", "notes.txt"):
        assert not covered(tmp_path / name, found), name
