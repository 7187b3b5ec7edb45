"""What the documents say is so: the sample runs; options, files and names in them exist."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from integration.machine import free_port
from tables import ARCHITECTURE, with_tables

from sharded_milter import __version__
from sharded_milter.cli.ctl import ctl
from sharded_milter.cli.daemon import daemon
from sharded_milter.dialects.loader import load
from sharded_milter.protocol import commands
from sharded_milter.protocol.replies import (
    Accept,
    AddHeader,
    Continue,
    InsertHeader,
    ReplyCode,
    parse_reply,
)
from sharded_milter.protocol.stages import Stage
from sharded_milter.testing.mta import Mail, MtaClient

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
OTHERS_OPTIONS = {"--help", "--ms", "--strict", "--verbose", "--write"}  # of scripts, and of mypy
SETUP_CFG = (ROOT / "setup.cfg").read_text()
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())
PROGRAMS: list[click.Command] = [daemon, *ctl.commands.values()]


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """The README's milter as a file of its own."""
    return example(ROOT / "README.md", "spamguard.py", tmp_path)


def example(document: Path, name: str, folder: Path) -> Path:
    """The code that a document calls by a file's name, as that file."""
    block = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", document.read_text(), re.S)
    assert block is not None
    path = folder / name
    path.write_text(block[1])
    return path


def test_the_readmes_milter_answers(sample: Path) -> None:
    milter = load(f"{sample}:milter")
    to_ghost = b"".join(
        packet.encode() for packet in (commands.Mail("<a@b>"), commands.Rcpt("<ghost@c>"))
    )
    refused = milter.answer(Stage.RCPT, b"", to_ghost)
    assert isinstance(refused, bytes)
    assert parse_reply(refused) == ReplyCode("550 5.1.1 no such user: ghost@c")
    tagged = milter.answer(Stage.EOM, b"", commands.Mail("<a@b>").encode())
    assert isinstance(tagged, bytes)
    length = 4 + int.from_bytes(tagged[:4], "big")
    added = parse_reply(tagged[:length])
    assert isinstance(added, InsertHeader)
    assert (added.name, added.value) == ("X-Score", "0.00")


def test_yatxmilters_example_serves_with_its_imports_changed(tmp_path: Path) -> None:
    path = example(ROOT / "docs" / "yatxmilter.md", "yatxmilter.py", tmp_path)
    port = free_port()
    path.write_text(path.read_text().replace("1234", str(port)))  # another test may have that
    program = subprocess.Popen([sys.executable, str(path)], cwd=tmp_path)
    try:
        with MtaClient(connected(port, program)) as client:
            assert client.deliver(Mail(b"Subject: hi\r\n\r\n.\r\n")).verdict == Continue()
    finally:
        program.terminate()
        program.wait()


def connected(port: int, program: subprocess.Popen[bytes]) -> socket.socket:
    while program.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise AssertionError(f"the program has ended with {program.returncode}")


def test_the_class_for_who_comes_from_yatxmilter_answers(tmp_path: Path) -> None:
    path = example(ROOT / "docs" / "yatxmilter.md", "policy.py", tmp_path)
    for name in ("Policy", "PolicyFactory"):
        milter = load(f"{path}:{name}")
        offer = commands.Negotiate(6, 0x1FF, 0x1FFFFF)
        client = commands.Connect("mail.example.org", "4", 25, "192.0.2.1")
        connection = b"".join(packet.encode() for packet in (offer, offer, client))
        assert milter.answer(Stage.CONNECT, connection, b"", 1) == Continue().encode()
        rcpt = commands.Mail("<a@b>").encode() + commands.Rcpt("<ghost@c>").encode()
        answer: Any = milter.answer(Stage.RCPT, b"", rcpt, 1)
        refused = parse_reply(asyncio.run(answer))
        assert refused == ReplyCode("550 5.1.1 no such user")
        tagged = milter.answer(Stage.EOM, b"", commands.Eom().encode(), 1)
        assert tagged == AddHeader("X-Client", " mail.example.org").encode() + Accept().encode()


def test_the_readmes_milter_is_typed(sample: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", str(sample)]
    # mypy does not follow the import hook of an editable install.
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=sample.parent, env=env, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_that_is_named_exists(document: Path) -> None:
    known = {
        option for program in PROGRAMS for parameter in program.params for option in parameter.opts
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text()))
    assert named - known - OTHERS_OPTIONS == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document: Path) -> None:
    assert [path for path in paths_in(document.read_text()) if not (ROOT / path).exists()] == []


def paths_in(text: str) -> list[str]:
    """Files and folders of ours that a text names."""
    folders = r"(?:sharded_milter|workers|tests|bench|docs|\.ci)/[\w./]*"
    return re.findall(rf"`({folders}|[A-Z]+\.md|setup\.cfg|noxfile\.py)`", text)


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "bench/README.md"], ids=str)
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_a_recipes_names_are_in_the_files_that_it_names_beside_them() -> None:
    recipes = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2]
    wrong: list[tuple[str, str]] = []
    for step in re.findall(r"^\d\. .*\n(?:   .*\n)*", recipes, re.M):
        files = [path for path in paths_in(step) if path.endswith((".py", ".cfg"))]
        code = "".join((ROOT / path).read_text() for path in files)
        names = set(re.findall(r"`([A-Za-z_.]+)`", step)) - set(files)
        wrong += [(step, name) for name in names if files and not re.search(rf"\b{name}\b", code)]
    assert wrong == []


def test_every_session_of_nox_is_explained() -> None:
    functions = [node for node in NOXFILE.body if isinstance(node, ast.FunctionDef)]
    sessions = {
        function.name
        for function in functions
        if any("nox.session" in ast.unparse(each) for each in function.decorator_list)
    }
    explained = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert sorted(explained) == sorted(sessions)


def test_the_pythons_that_are_claimed_are_those_of_the_tests() -> None:
    claimed = re.findall(r"^    Programming Language :: Python :: (3\.\d+)$", SETUP_CFG, re.M)
    assert repr(tuple(claimed)).replace("'", '"') in (ROOT / "noxfile.py").read_text()
    assert f"python_requires = >={claimed[0]}\n" in SETUP_CFG


def test_the_changelog_has_a_section_for_this_version() -> None:
    sections = re.findall(
        r"^## \[(.+)\](?: - \d{4}-\d\d-\d\d)?$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert sections[0] == "Unreleased"
    assert __version__ in sections
    assert f"\nversion = {__version__}\n" in SETUP_CFG


def test_every_option_is_explained() -> None:
    parameters = [parameter for program in PROGRAMS for parameter in program.params]
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_architectures_tables_are_those_of_the_code() -> None:
    text = ARCHITECTURE.read_text()
    assert with_tables(text) == text  # else: python tests/tables.py --write


def test_every_module_and_name_of_the_architecture_is_in_the_code() -> None:
    """A name must be defined in a file that the same paragraph, step or row names."""
    text = re.sub(r"<!-- \w+ -->.*?<!-- end -->", "", ARCHITECTURE.read_text(), flags=re.S)
    wrong: list[str] = []
    for part in re.split(r"\n(?=\n|\d+\. |\| )", text):
        words = re.findall(r"`([^`]+)`", part)
        files = [module_file(word) for word in words if word.endswith(".py")]
        assert [path for path in files if not path.exists()] == []
        names = {name for path in files for name in defined_in(ast.parse(path.read_text()))}
        said = [word for word in words if re.fullmatch(r"_?[A-Z]\w*(\.\w+)?|_?[a-z]\w*", word)]
        wrong += [word for word in said if word not in names | NO_NAMES]
        folders = [word for word in words if re.fullmatch(r"[a-z_]+/", word)]
        wrong += [folder for folder in folders if not module_file(folder).is_dir()]
    assert wrong == []


#: Words of ARCHITECTURE.md that are no names in a file: the layers, and two commands.
NO_NAMES = {path.stem for path in (ROOT / "sharded_milter").iterdir()} | {"bench", "tune"}


def module_file(path: str) -> Path:
    """The file that ARCHITECTURE.md calls so: in the package, or in a folder beside it."""
    beside = path.startswith(("sharded_milter/", "workers/", "tests/"))
    return ROOT / path if beside else ROOT / "sharded_milter" / path


def defined_in(tree: ast.Module) -> set[str]:
    """The functions, classes, constants, methods and attributes that a module defines."""
    names = {target for node in tree.body for target in targets_of(node)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            inside = [*node.body, *(each for each in ast.walk(node) if isinstance(each, SETS))]
            names |= {f"{node.name}.{target}" for each in inside for target in targets_of(each)}
    return names


SETS = (ast.Assign, ast.AnnAssign)


def targets_of(node: ast.AST) -> list[str]:
    """What a statement defines: `name` also for `self.name`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return []
    return [ast.unparse(target).removeprefix("self.") for target in targets]
