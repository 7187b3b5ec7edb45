"""Imports point one way. Whoever needs an exception needs a better place for the code."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharded_milter
import sharded_milter.workers

PACKAGE = Path(sharded_milter.__file__).parent
WORKERS = Path(sharded_milter.workers.__file__).parent

#: What each part may import, of our package (with a dot) and of others. A name covers what is
#: below it; the standard library is free for all.
ALLOWED: dict[str, set[str]] = {
    ".__init__": {".api", ".errors"},
    ".__main__": {".cli"},
    ".errors": set(),
    ".protocol": {".protocol", ".errors"},
    ".api": {".api", ".errors", ".protocol.text"},
    ".dialects": {".dialects", ".api", ".protocol", ".errors"},
    ".coroutines": {".errors", "twisted"},
    ".limits": {".protocol"},
    ".descriptors": {".errors"},
    ".alarms": set(),
    ".closing": set(),
    ".prctl": set(),
    ".accounts": set(),
    ".forks": {"twisted"},
    ".transports": {".closing", "twisted"},
    ".reactor": {"twisted"},
    ".ipc": {".ipc", ".alarms", ".closing", ".protocol", ".errors", "twisted", "ampoule"},
    ".dispatch": {".dispatch", ".alarms", ".ipc", ".limits", ".protocol", ".errors", "twisted"},
    ".mta": {
        ".mta", ".dispatch", ".accounts", ".alarms", ".descriptors", ".ipc", ".limits", ".protocol",
        ".errors", ".transports", "twisted", "zope",
    },
    ".pool": {
        ".pool", ".dispatch", ".alarms", ".closing", ".forks", ".ipc", ".limits", ".prctl",
        ".protocol", ".errors", ".transports", "twisted", "psutil", "ampoule",
    },
    ".context": {".mta", ".dispatch", ".alarms", ".ipc", ".limits"},
    ".server": {
        ".alarms", ".context", ".mta", ".dispatch", ".pool", ".limits", ".protocol", "twisted",
    },
    ".in_master": {
        ".alarms", ".dispatch", ".ipc", ".limits", ".coroutines", ".forks", ".protocol", ".errors",
        "twisted",
    },
    ".embedded": {
        ".alarms", ".context", ".in_master", ".mta", ".dispatch", ".limits", ".dialects", "twisted",
    },
    ".scanner": {".scanner", ".api", ".errors", "yara_x"},
    ".workers": {
        ".workers", ".dialects", ".ipc", ".coroutines", ".forks", ".prctl", ".protocol", ".errors",
        ".transports", "twisted", "ampoule",
    },
    ".testing": {".testing", ".api", ".dialects", ".protocol", ".errors"},
    ".sizing": {".sizing", ".testing", ".protocol", ".errors", "psutil", "rich"},
    ".ops": {
        ".ops", ".accounts", ".limits", ".dispatch.policy", ".mta.addresses", ".mta.peers",
        ".dialects.spec", ".protocol", ".errors", "twisted", "zope", "click",
    },
    ".cli": {
        ".cli", ".ops", ".alarms", ".server", ".in_master", ".forks", ".mta", ".dispatch", ".pool",
        ".testing", ".sizing", ".descriptors", ".dialects", ".prctl", ".protocol", ".errors",
        ".reactor", ".__version__",
        "twisted", "click", "rich", "psutil",
    },
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours by its name, a dot instead of `sharded_milter.`."""
    for root, prefix in ((PACKAGE, ""), (WORKERS, ".workers")):
        for path in sorted(root.rglob("*.py")):  # which follows no link: workers/ comes once
            parts = path.relative_to(root).with_suffix("").parts
            yield prefix + "".join(f".{part}" for part in parts), path


def imported(name: str, path: Path) -> Iterator[str]:
    """The absolute names of what a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            where = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{where}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> str:
    return "." + name.split(".")[1]


def place_of(full: str) -> str:
    """Where an imported name lives; those that the package exports live in its api."""
    what = full.removeprefix("sharded_milter")
    return ".api" if what[1:] in sharded_milter.__all__ else what


MODULES = dict(modules())


def test_every_module_has_a_layer() -> None:
    assert {layer_of(name) for name in MODULES} == set(ALLOWED)


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    packages = {f"sharded_milter{name.rpartition('.__init__')[0]}" for name in MODULES
                if name.endswith(".__init__")}  # fmt: skip
    assert set(setup["options"]["packages"].split()) == packages


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    allowed = ALLOWED[layer_of(name)]
    places = map(place_of, imported(name, MODULES[name]))
    others = (what for what in places if what.split(".")[0] not in sys.stdlib_module_names)
    assert [
        what
        for what in others
        if not any(what == free or what.startswith(f"{free}.") for free in allowed)
    ] == []


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after the statement."""
    script = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["sharded_milter", "sharded_milter.protocol.session", "sharded_milter.dialects.loader",
     "sharded_milter.testing.mta", "sharded_milter.dispatch.queue"],
)  # fmt: skip
def test_what_is_pure_loads_no_twisted(module: str) -> None:
    assert "twisted" not in loaded_by(f"import {module}")


def test_the_names_for_authors_load_nothing_but_their_own_layer() -> None:
    ours = {
        name for name in loaded_by("import sharded_milter") if name.startswith("sharded_milter.")
    }
    assert {name.split(".")[1] for name in ours} == {"api", "errors", "protocol"}


def test_the_master_and_its_program_load_no_authors_dialect() -> None:
    loaded = loaded_by("import sharded_milter.server, sharded_milter.cli.daemon")
    prefixes = ("sharded_milter.dialects.", "sharded_milter.workers")
    how_milters_are_named = "sharded_milter.dialects.spec"
    assert {name for name in loaded if name.startswith(prefixes)} == {how_milters_are_named}


@pytest.mark.parametrize("module", ["sharded_milter.cli.daemon", "sharded_milter.cli.ctl"])
def test_the_programs_choose_no_reactor_before_they_run(module: str) -> None:
    assert "twisted.internet.reactor" not in loaded_by(f"import {module}")


@pytest.mark.parametrize("asyncio", [False, True])
def test_only_milters_in_the_master_make_it_load_tls_and_asyncio(asyncio: bool) -> None:
    loaded = loaded_by(
        "from sharded_milter.cli.daemon import install_reactor;"
        f" install_reactor(asyncio={asyncio});"
        " import sharded_milter.server, sharded_milter.pool.shard"
    )
    assert loaded.isdisjoint({"OpenSSL.SSL", "cryptography", "psutil"}) is not asyncio
    assert ("twisted.internet.asyncioreactor" in loaded) is asyncio


#: The modules with state machines, each with the enumeration of its states.
MACHINES = {
    ".protocol.session": "State",
    ".pool.shard": "ShardState",
    ".pool.generation": "GenerationState",
}
STATES = {"state", "_state"}


def touched(tree: ast.AST) -> Iterator[ast.Attribute]:
    """The states that are assigned or compared somewhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            where: list[ast.AST] = [*node.targets]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            where = [node.target]
        elif isinstance(node, ast.Compare):
            where = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            where = [node.subject]
        elif isinstance(node, ast.Subscript):  # a table of one's own
            where = [node.slice]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "getattr"):
            yield from (
                ast.Attribute(node.args[0], name.value)
                for name in node.args[1:2]
                if isinstance(name, ast.Constant) and name.value in STATES
            )
            continue
        else:
            continue
        for part in (part for each in where for part in ast.walk(each)):
            if isinstance(part, ast.Attribute) and part.attr in STATES:
                yield part


@pytest.mark.parametrize("name", [name for name in MODULES if name not in MACHINES])
def test_no_state_of_a_machine_is_assigned_or_compared_outside_of_it(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    assert [ast.unparse(node) for node in touched(tree)] == []


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_touches_its_own_state_only(name: str) -> None:
    found = {ast.unparse(node) for node in touched(ast.parse(MODULES[name].read_text()))}
    assert found <= {"self.state", "self._state"}
    assert found


@pytest.mark.parametrize("name", [".pool.shard", ".pool.generation"])
def test_a_state_is_assigned_where_its_table_is_read_and_nowhere_else(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    where = {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.state"
    }
    assert {each.lstrip("_") for each in where} == {"init__", "handle_event"}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in MACHINES])
def test_states_are_imported_by_their_own_module_and_tests_only(name: str) -> None:
    states = {f"sharded_milter{module}.{states}" for module, states in MACHINES.items()}
    assert states.isdisjoint(imported(name, MODULES[name]))
    tree = ast.parse(MODULES[name].read_text())
    through = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [ast.unparse(node) for node in through if node.attr in MACHINES.values()] == []
