"""What authors may rely on: the names, and what a type checker tells them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mypy import api as mypy

import sharded_milter

# fmt: off
NAMES = [
    "Accept", "Action", "AddHeader", "AddRecipient", "Address", "ChangeHeader", "ChangeSender",
    "Connection", "DeleteHeader", "DeleteRecipient", "Discard", "Envelope", "Header", "Headers",
    "InsertHeader", "InvalidValue", "InvalidVerdict", "Macros", "Message", "Milter",
    "MilterError", "Quarantine", "Reject", "ReplaceBody", "TempFail", "Verdict",
]
# fmt: on

SAMPLE = """
from sharded_milter import Accept, AddHeader, Address, Envelope, Message, Milter, Reject, Verdict

class Model:
    def score(self, raw: bytes) -> float: return 0.5
def exists(recipient: Address) -> bool: return True

MODEL = Model()
milter = Milter("spamguard", macros={"eom": ["i", "{auth_authen}"]})

@milter.rcpt(light=True)
def known_recipient(recipient: Address, envelope: Envelope) -> Reject | None:
    return None if exists(recipient) else Reject(f"no such user: {recipient}", xcode="5.1.1")

@milter.eom
def scan(message: Message) -> Verdict:
    score = MODEL.score(bytes(message))
    if score > .99:
        return Reject("message looks like spam")
    return Accept(AddHeader("X-Spam-Score", f"{score:.2f}"))
"""

HEAD = """
from sharded_milter import *
from sharded_milter import Address, Connection, Envelope, Headers, Message, Milter, Verdict
milter = Milter("test")
"""

ACCEPTED = {
    "a coroutine": "@milter.eom\nasync def f(message: Message) -> Verdict: return None",
    "a coroutine that is light": (
        "@milter.rcpt(light=True)\n"
        "async def f(recipient: Address, envelope: Envelope) -> TempFail | None: return None"
    ),
    "discard at mail": "@milter.mail\ndef f(envelope: Envelope) -> Discard: return Discard()",
    "accept at connect": "@milter.connect\ndef f(c: Connection) -> Accept: return Accept()",
    "an unknown command": "@milter.unknown\ndef f(c: str, d: Connection) -> Reject | None: ...",
    "a look-up by name": (
        "def f(m: Message) -> str | None: return m.headers['to'] if 'To' in m.headers else None"
    ),
    "a look at every field": "def f(h: Headers) -> list[str]: return [each.name for each in h]",
    "the header": "@milter.eoh()\ndef f(e: Envelope, h: Headers) -> Verdict: return Discard()",
}
REJECTED = {
    "accept from rcpt": "@milter.rcpt\ndef f(r: Address, e: Envelope) -> Accept: return Accept()",
    "discard from connect": "@milter.connect\ndef f(c: Connection) -> Discard: return Discard()",
    "discard from helo": "@milter.helo\ndef f(c: Connection) -> Discard: return Discard()",
    "an action inside reject": 'Reject(AddHeader("X", "v"))',
    "an action as verdict": '@milter.eom\ndef f(m: Message) -> Quarantine: return Quarantine("x")',
    "a text as verdict": "@milter.eom\ndef f(m: Message) -> str: return 'reject'",
    "a callback at the wrong stage": "@milter.mail\ndef f(m: Message) -> Verdict: return None",
    "a callback with too few arguments": "@milter.rcpt\ndef f(e: Envelope) -> None: ...",
    "a light callback at the wrong stage": (
        "@milter.helo(light=True)\ndef f(m: Message) -> None: return None"
    ),
    "a coroutine with a wrong verdict": (
        "@milter.rcpt\nasync def f(r: Address, e: Envelope) -> Accept: return Accept()"
    ),
    "a verdict inside accept": 'Accept(Reject("no"))',
    "an unknown key to shard by": 'Milter("x", shard_by="subject")',
    "a value that is changed": 'Reject("no").text = "yes"',
}  # fmt: skip


def complaints(folder: Path, source: str) -> list[int]:
    """The lines that `mypy --strict` complains about."""
    (folder / "author.py").write_text(source)
    cache = ["--cache-dir", str(folder / "cache"), "--config-file", ""]
    text, errors, _ = mypy.run(["--strict", *cache, str(folder / "author.py")])
    assert errors == ""
    return [int(line) for line in re.findall(r"author\.py:(\d+): error:", text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("author")


def test_the_names_for_authors_are_these() -> None:
    assert sharded_milter.__all__ == NAMES
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(sharded_milter, name)
    if isinstance(value, type):
        assert (value.__doc__ or "").strip()


def test_the_package_says_its_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", sharded_milter.__version__)


def test_the_sample_milter_is_accepted_by_a_type_checker(folder: Path) -> None:
    assert complaints(folder, SAMPLE) == []


@pytest.mark.parametrize("code", ACCEPTED.values(), ids=ACCEPTED)
def test_a_type_checker_accepts(folder: Path, code: str) -> None:
    assert complaints(folder, HEAD + code) == []


def test_a_type_checker_refuses_what_a_stage_cannot_say(folder: Path) -> None:
    sources = [HEAD, *(f"def _{n}() -> None:\n    " + code.replace("\n", "\n    ")
                       for n, code in enumerate(REJECTED.values()))]  # fmt: skip
    found = complaints(folder, "\n".join(sources))
    lines = "\n".join(sources).splitlines()
    starts = [number for number, line in enumerate(lines, 1) if line.startswith("def _")]
    blamed = {sum(start <= line for start in starts) - 1 for line in found}
    silent = [name for n, name in enumerate(REJECTED) if n not in blamed]
    assert silent == []
