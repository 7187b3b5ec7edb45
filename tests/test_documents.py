"""What the documents say is so: the sample runs, options and files that are named exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sharded_milter.cli.daemon import daemon
from sharded_milter.dialects.loader import load
from sharded_milter.protocol import commands
from sharded_milter.protocol.replies import InsertHeader, ReplyCode, parse_reply
from sharded_milter.protocol.stages import Stage

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS_OPTIONS = {
    "--help",
    # of sharded-milterctl and of the bench scripts
    "--rounds",
    "--messages",
    "--connections",
    "--ms",
}


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """The README's milter as a file of its own."""
    block = re.search(
        r"<!-- spamguard.py -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert block is not None
    path = tmp_path / "spamguard.py"
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
    known = {option for parameter in daemon.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text()))
    assert named - known - OTHERS_OPTIONS == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document: Path) -> None:
    paths = re.findall(
        r"`((?:sharded_milter|workers|tests|bench|docs)/[\w./]*)`", document.read_text()
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_option_is_explained() -> None:
    options = [parameter for parameter in daemon.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []
