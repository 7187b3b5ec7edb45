"""Every method of the context in every callback: what it returns or raises, and what is sent."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..milter_client import OFFER
from . import scripts
from .conftest import Runner, Runners
from .wire import Session

pytestmark = pytest.mark.integration

Story = list[tuple[bytes, list[tuple[bytes, bytes]]]]
Lines = list[dict[str, Any]]
Play = Callable[..., tuple[Story, Lines]]
PlayEach = Callable[[list[dict[str, Any]]], list[Story]]

CONTINUE = [(b"c", b"")]
RAISED = b"451 4.3.0 pymilter: untrapped exception in everything\0"


def player(runner: Runner, folder: Path) -> Play:
    """Runs our script with a plan through one session: what was sent, and what it wrote down."""

    def play(offer: bytes = OFFER, **plan: Any) -> tuple[Story, Lines]:
        listen = f"unix:{folder}/milter.sock"
        record = folder / "record"
        script = scripts.everything(record, listen, json.dumps(plan))
        with runner(script, folder), Session(listen, offer) as session:
            story = [(b"O", session.negotiated), *session.play()]
        return story, [json.loads(line) for line in record.read_text().splitlines()]

    return play


@pytest.fixture
def play(runner: Runner, tmp_path: Path) -> Play:
    """With each runner."""
    return player(runner, tmp_path)


@pytest.fixture
def play_each(runner: Runner, tmp_path: Path) -> PlayEach:
    """With each runner: a session for each plan. One script serves them all, as it does mail."""

    def play(plans: list[dict[str, Any]]) -> list[Story]:
        listen = f"unix:{tmp_path}/milter.sock"
        names = [f"client{number}.test" for number in range(len(plans))]
        plan = {"calls": [], "progress": [], "cases": dict(zip(names, plans, strict=True))}
        stories = []
        with runner(scripts.everything(tmp_path / "record", listen, json.dumps(plan)), tmp_path):
            for name in names:
                with Session(listen) as session:
                    stories.append(session.play(name.encode()))
        return stories

    return play


@pytest.fixture
def play_plainly(runners: Runners, tmp_path: Path) -> Play:
    """With pymilter itself: what ours is compared with in `test_side_by_side`."""
    return player(runners.plain, tmp_path)


def answers(story: Story, letter: bytes) -> list[tuple[bytes, bytes]]:
    """What the first command with this letter was answered."""
    return next(answers for command, answers in story if command == letter)


def outcomes(lines: Lines) -> dict[tuple[str, ...], dict[str, str]]:
    """By method and arguments: in which callback it had which outcome."""
    found: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for line in lines:
        outcome = (
            line["raised"] + ": " + line["text"] if "raised" in line else line.get("returned", "")
        )
        found[line["method"], *line["arguments"]][line["callback"]] = outcome
    return found


def test_actions_work_in_eom_only(play_plainly: Play) -> None:
    story, lines = play_plainly()
    found = outcomes(lines)
    for action, error in {
        ("addheader", "'X-A'", "'appended'"): "error: cannot add header",
        ("chgheader", "'Subject'", "1", "None"): "error: cannot change header",
        ("addrcpt", "'added@example.com'", "None"): "error: cannot add recipient",
        ("delrcpt", "'<recipient@example.com>'"): "error: cannot delete recipient",
        ("replacebody", "b''"): "error: cannot replace message body",
        ("quarantine", "'a reason'"): "error: cannot quarantine message",
        ("chgfrom", "'<new@example.org>'"): "error: cannot change sender",
    }.items():
        by_callback = found[action]
        assert by_callback.pop("eom") == "None", action
        assert set(by_callback.values()) == {error}, action
        assert len(by_callback) == 12, action
    for method in ("getsymval", "setreply"):
        for key, by_callback in found.items():
            if key[0] == method and "TypeError" in by_callback["eom"]:
                assert len(set(by_callback.values())) == 1, key
    # What it calls at eom is on the wire, in its order; nothing was sent before that.
    for command, said in story:
        assert command in (b"O", b"E") or said == CONTINUE, (command, said)
    sent = answers(story, b"E")
    assert (b"h", b"X-A\0appended\0") in sent
    assert (b"i", b"\0\0\0\0X-B\0on top\0") in sent
    assert (b"m", b"\0\0\0\1Subject\0\0") in sent
    assert (b"2", b"<added@example.com>\0NOTIFY=NEVER\0") in sent
    assert (b"b", b"bytes \xff\0\r\n") in sent
    assert (b"q", b"two\nlines\0") in sent
    assert (b"e", b"<new@example.org>\0SIZE=10 BODY=8BITMIME\0") in sent
    assert sent[-2:] == [(b"p", b""), (b"c", b"")]
    assert max(len(payload) for _, payload in sent) == 65535


def test_macros_are_seen_from_their_stage_on(play_plainly: Play) -> None:
    _, lines = play_plainly()
    found = outcomes(lines)
    for name in ("'i'", "'{i}'"):
        assert found["getsymval", name]["body"] == "'QUEUEID'"
        assert found["getsymval", name]["connect"] == "None"
    assert found["getsymval", "'{j}'"]["hello"] == "'mx.example.test'"
    assert found["getsymval", "'j'"]["negotiate"] == "None"
    assert found["getsymval", "'mail_addr'"]["envfrom"] == "None"
    assert found["getsymval", "'{8bit}'"]["envfrom"].startswith("UnicodeDecodeError: ")


RETURNED = {
    "ACCEPT": (b"a", b""),
    "DISCARD": (b"d", b""),
    "REJECT": (b"r", b""),
    "TEMPFAIL": (b"t", b""),
    "raise": (b"y", RAISED),
    "None": (b"y", RAISED),
    "'text'": (b"y", RAISED),
    "True": (b"r", b""),
}


def test_return_values(play_each: PlayEach) -> None:
    stories = play_each([{"answers": {"eom": answer}} for answer in RETURNED])
    assert {
        answer: answers(story, b"E") for answer, story in zip(RETURNED, stories, strict=True)
    } == {answer: [sent] for answer, sent in RETURNED.items()}


@pytest.mark.parametrize(
    ("policy", "sent"),
    [
        ("CONTINUE", (b"c", b"")),
        ("ACCEPT", (b"a", b"")),
        ("REJECT", (b"y", b"554 5.3.0 pymilter: untrapped exception in everything\0")),
        ("TEMPFAIL", (b"y", RAISED)),
    ],
)
def test_exception_policies(play: Play, policy: str, sent: tuple[bytes, bytes]) -> None:
    story, _ = play(calls=[], progress=[], answers={"eom": "raise"}, policy=policy)
    assert answers(story, b"E") == [sent]


REPLIES = [
    ("REJECT", ["550", "5.7.1", "100%% sure"], (b"y", b"550 5.7.1 100%% sure\0")),
    ("REJECT", ["550", None, "text"], (b"y", b"550 text\0")),
    ("REJECT", ["550", None, "one", "two"], (b"y", b"550-5.0.0 one\r\n550 5.0.0 two\0")),
    ("REJECT", ["450", "4.7.1", "text"], (b"r", b"")),
    ("TEMPFAIL", ["550", "5.7.1", "text"], (b"t", b"")),
    ("TEMPFAIL", ["421", "4.3.2", "text"], (b"y", b"421 4.3.2 text\0")),
    ("ACCEPT", ["550", "5.7.1", "text"], (b"a", b"")),
]


def test_replies(play_each: PlayEach) -> None:
    stories = play_each(
        [
            {"answers": {"eom": verdict}, "replies": {"eom": [reply]}}
            for verdict, reply, _ in REPLIES
        ]
    )
    assert [
        (verdict, reply, answers(story, b"E"))
        for (verdict, reply, _), story in zip(REPLIES, stories, strict=True)
    ] == [(verdict, reply, [sent]) for verdict, reply, sent in REPLIES]


def test_callbacks_without_reply(play_plainly: Play) -> None:
    """Which callbacks run and what they get does not depend on who sends the CONTINUE."""
    envelope = ["connect", "hello", "envfrom", "envrcpt", "data", "unknown"]
    callbacks = [*envelope, "header", "eoh", "body"]
    story, with_bits = play_plainly(calls=[], noreply=callbacks)
    assert answers(story, b"O") == [(b"O", bytes.fromhex("00000006 000001ff 000ff480"))]
    assert all(said == [] for command, said in story if command not in (b"O", b"E"))
    old_offer = bytes.fromhex("00000006 000001ff 0000007f")
    story, without = play_plainly(old_offer, calls=[], noreply=callbacks)
    assert answers(story, b"O") == [(b"O", bytes.fromhex("00000006 000001ff 00000000"))]
    assert all(said == CONTINUE for command, said in story if command not in (b"O", b"E"))
    called = [
        [line for line in lines if line["method"] == "called"] for lines in (with_bits, without)
    ]
    assert [line["arguments"] for line in called[0][1:]] == [
        line["arguments"] for line in called[1][1:]
    ]


def test_functions_of_the_module(play_plainly: Play) -> None:
    _, lines = play_plainly(module=True, calls=[], progress=[])
    found = outcomes(lines)
    assert found["set_exception_policy", "2"]["module"] == "error: invalid exception policy"
    assert found["setbacklog", "0"]["module"] == "error: cannot set backlog"
    assert found["setconn", "''"]["module"] == "error: cannot set connection"
    assert found["getversion",]["module"] == "(1, 0, 1)"
    [ended] = [line for line in lines if line["method"] == "runmilter"]
    assert ended["returned"] == "None"
