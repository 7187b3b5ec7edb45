"""Loading a milter from a file or a module, and every way to fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sharded_milter.dialects.loader import code_digest, load
from sharded_milter.dialects.spec import checked_spec, split_spec
from sharded_milter.errors import ConfigError, MilterLoadError, UsageError

GOOD = """
from sharded_milter import Milter
milter = Milter("good")
milter.eom(lambda message: None)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty current directory; restore modules and path afterwards."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    sys.path[:] = [entry for entry in path if entry]
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(spec: str) -> MilterLoadError:
    with pytest.raises(MilterLoadError) as caught:
        load(spec)
    assert caught.value.exit_code == os.EX_CONFIG
    return caught.value


@pytest.mark.parametrize(
    ("spec", "where", "name"),
    [
        ("a:b", "a", "b"),
        ("a.b.c:milter", "a.b.c", "milter"),
        ("/etc/x.py:milter", "/etc/x.py", "milter"),
        ("/a:b/c.py:d", "/a:b/c.py", "d"),
    ],
)
def test_a_spec_is_a_place_and_a_name(spec: str, where: str, name: str) -> None:
    assert split_spec(spec) == (where, name)
    assert checked_spec(spec) == spec


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "a",
        ":",
        ":b",
        "a:",
        "a:b.c",
        "a:1",
        "x.py",
        "a:b c",
        "a:b:c",
        "./a.md:b",
        "a/b:c",
        "a..b:c",
    ],
)
def test_any_other_spec_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match="is neither MODULE:NAME nor FILE"):
        checked_spec(spec)


@pytest.mark.parametrize("spelling", ["{}/good.py:milter", "./good.py:milter", "good.py:milter"])
def test_a_file_is_loaded_by_any_path(folder: Path, spelling: str) -> None:
    (folder / "good.py").write_text(GOOD)
    assert load(spelling.format(folder)).manifest.name == "good"


def test_a_module_is_found_in_the_current_directory(folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "good.py").write_text(GOOD)
    assert load("package.good:milter").manifest.name == "good"


def test_the_current_directory_comes_last(folder: Path) -> None:
    (folder / "this.py").write_text("raise RuntimeError('hijacked')")
    refused = refusal("this:milter")
    assert str(refused) == "milter this:milter: this has no 'milter'"
    assert sys.path[-1] == str(folder)


def test_a_file_may_import_its_neighbours(folder: Path) -> None:
    (folder / "milters").mkdir()
    (folder / "milters" / "neighbour.py").write_text("NAME = 'near'")
    (folder / "milters" / "good.py").write_text(GOOD.replace('"good"', "NAME").replace(
        "from", "from neighbour import NAME\nfrom", 1))  # fmt: skip
    assert load("milters/good.py:milter").manifest.name == "near"


def test_a_file_is_a_module_that_can_be_looked_up(folder: Path) -> None:
    (folder / "good.py").write_text(
        "import sys\nassert sys.modules[__name__].__file__ == __file__" + GOOD
    )
    assert load("good.py:milter").manifest.name == "good"


def test_a_missing_file_is_named() -> None:
    assert str(refusal("./none.py:milter")) == "milter file ./none.py does not exist"


@pytest.mark.parametrize("missing", ["none", "none.sub", "os.none"])
def test_a_missing_module_is_named_without_a_traceback(missing: str) -> None:
    refused = refusal(f"{missing}:milter")
    assert str(refused).startswith(f"milter {missing}:milter: there is no module '")
    assert refused.details == ""


def test_a_module_that_the_milter_lacks_is_its_own_fault(folder: Path) -> None:
    (folder / "good.py").write_text("import none_such" + GOOD)
    for spec in ("good:milter", "good.py:milter"):
        refused = refusal(spec)
        assert "ModuleNotFoundError: No module named 'none_such'" in str(refused)
        assert "good.py" in refused.details


def test_a_missing_name_is_named(folder: Path) -> None:
    (folder / "good.py").write_text(GOOD)
    assert str(refusal("good:filter")) == "milter good:filter: good has no 'filter'"


@pytest.mark.parametrize(("value", "kind"), [("5", "int"), ("None", "NoneType"), ("int", "type")])
def test_what_is_no_milter_is_named(folder: Path, value: str, kind: str) -> None:
    (folder / "wrong.py").write_text(f"milter = {value}")
    assert str(refusal("wrong:milter")) == (
        f"milter wrong:milter: milter is of type {kind}, not a Milter, a subclass of it, or a"
        " factory"
    )


def test_a_milter_without_callbacks_is_refused(folder: Path) -> None:
    (folder / "idle.py").write_text("from sharded_milter import Milter\nmilter = Milter('idle')")
    assert str(refusal("idle:milter")) == "milter idle:milter: milter has no callback"


FAILURES = {
    "exception": ("def f():\n    raise ValueError('one\\ntwo')\nf()", "ValueError: one", "line 2"),
    "exit": ("import sys\nsys.exit('no model')", "SystemExit: no model", "line 2"),
    "syntax error": ("def f(:", "SyntaxError: invalid syntax", "line 1"),
    "bad value": ("from sharded_milter import Milter\nMilter('')", "InvalidValue:", "line 2"),
}


@pytest.mark.parametrize("spelling", ["broken.py:milter", "broken:milter"])
@pytest.mark.parametrize(("source", "summary", "line"), FAILURES.values(), ids=FAILURES)
def test_the_authors_failure_is_one_line_and_his_traceback(
    folder: Path, spelling: str, source: str, summary: str, line: str
) -> None:
    (folder / "broken.py").write_text(source)
    refused = refusal(spelling)
    assert str(refused).startswith(f"milter {spelling} cannot be imported: {summary}")
    assert "\n" not in str(refused)
    assert line in str(refused)
    assert f'broken.py", {line}' in refused.details
    assert "importlib" not in refused.details
    assert "loader.py" not in refused.details


def test_a_failure_below_the_authors_code_names_his_line(folder: Path) -> None:
    (folder / "broken.py").write_text("import json\njson.loads('{')")
    refused = refusal("broken:milter")
    assert "JSONDecodeError" in str(refused)
    assert 'broken.py", line 2' in refused.details


def test_an_error_of_ours_in_a_module_keeps_its_words(folder: Path) -> None:
    source = "from sharded_milter.errors import ConfigError\nraise ConfigError('no such rules')"
    (folder / "scanner.py").write_text(source)
    assert str(refusal("scanner:milter")) == "no such rules"
    assert isinstance(refusal("scanner:milter"), ConfigError)


def test_a_directory_that_is_called_like_a_file_is_no_file(folder: Path) -> None:
    (folder / "good.py").mkdir()
    assert str(refusal("good.py:milter")) == "milter file good.py does not exist"


def test_a_file_that_no_loader_takes_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "good.py").write_text(GOOD)
    nothing: Any = lambda name, path: None  # noqa: E731
    monkeypatch.setattr("importlib.util.spec_from_file_location", nothing)
    assert str(refusal("good.py:milter")) == "milter file good.py is not a Python file"


# What tells whether two workers run the same code


def written(folder: Path, name: str, source: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(source)


@pytest.mark.parametrize(
    "spec", ["here/good.py:milter", "./here/good.py:milter", "here.good:milter"]
)
def test_the_digest_of_code_changes_with_its_file_and_with_nothing_else(
    folder: Path, spec: str
) -> None:
    written(folder, "here/good.py", GOOD)
    written(folder, "here/idle.py", "NOBODY_IMPORTS = 'this'")
    load(spec)
    first = code_digest([spec])
    written(folder, "here/idle.py", "")
    assert code_digest([spec]) == first
    written(folder, "here/good.py", f"{GOOD}# changed")
    second = code_digest([spec])
    (folder / "here/good.py").unlink()
    third = code_digest([spec])
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("beside", ["near", "below.deep"])
def test_the_digest_of_code_changes_with_the_modules_that_lie_beside_it(
    folder: Path, beside: str
) -> None:
    path = f"here/{beside.replace('.', '/')}.py"
    written(folder, path, "")
    written(folder, "here/good.py", f"import {beside}\n{GOOD}")
    load("here/good.py:milter")
    first = code_digest(["here/good.py:milter"])
    written(folder, path, "CHANGED = True")
    assert code_digest(["here/good.py:milter"]) != first


@pytest.mark.parametrize("elsewhere", ["elsewhere", "here-too"])
def test_a_module_from_elsewhere_is_not_the_milters_code(folder: Path, elsewhere: str) -> None:
    written(folder, f"{elsewhere}/distant.py", "")
    search = f"import sys; sys.path.append({elsewhere!r})"
    written(folder, "here/good.py", f"{search}\nimport distant\n{GOOD}")
    load("here/good.py:milter")
    first = code_digest(["here/good.py:milter"])
    written(folder, f"{elsewhere}/distant.py", "CHANGED = True")
    assert code_digest(["here/good.py:milter"]) == first


def test_in_a_folder_of_many_packages_a_milter_is_its_own_file_or_package(folder: Path) -> None:
    library = folder / "site-packages"
    written(library, "near.py", "")
    written(library, "package/within.py", "")
    written(library, "package/__init__.py", f"import near, package.within\n{GOOD}")
    written(library, "good.py", f"import near\n{GOOD}")
    sys.path.append(str(library))
    specs = ["good:milter", "package:milter"]
    for spec in specs:
        load(spec)
    first = [code_digest([spec]) for spec in specs]
    written(library, "near.py", "CHANGED = True")
    assert [code_digest([spec]) for spec in specs] == first
    written(library, "package/within.py", "CHANGED = True")
    assert [code_digest([spec]) == before for spec, before in zip(specs, first, strict=True)] == [
        True,
        False,
    ]


def test_several_milters_have_one_digest_in_any_order(folder: Path) -> None:
    specs = ["one.py:milter", "two.py:milter"]
    for spec in specs:
        written(folder, spec.partition(":")[0], GOOD)
        load(spec)
    both = code_digest(specs)
    assert code_digest(specs[::-1]) == both
    written(folder, "two.py", f"{GOOD}# changed")
    assert code_digest(specs) != both


@pytest.mark.parametrize("name", ["script.py", "script", "a:script", "my-milter"])
def test_a_script_is_its_file_and_what_lies_beside_it(folder: Path, name: str) -> None:
    written(folder, name, "# a script")
    first = code_digest([str(folder / name)])
    written(folder, name, "# another")
    assert code_digest([str(folder / name)]) != first


class Refuses:
    """An object in `sys.modules` whose attributes cannot be read."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(name)


@pytest.mark.parametrize("odd", [None, object(), Refuses()], ids=["nothing", "object", "refuses"])
def test_what_stands_in_for_a_module_does_no_harm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, odd: Any
) -> None:
    written(folder, "good.py", GOOD)
    load("good:milter")
    first = code_digest(["good:milter"])
    monkeypatch.setitem(sys.modules, "odd", odd)
    empty = ModuleType("empty")
    empty.__file__ = None
    monkeypatch.setitem(sys.modules, "empty", empty)
    assert code_digest(["good:milter"]) == first
