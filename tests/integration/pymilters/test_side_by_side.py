"""The same script and the same bytes, with plain pymilter and with ours: where they differ.

Every difference that is meant is named here; any other is a failure. What holds throughout:

- content (header fields, end of headers, body) is answered at the end of the message, which is
  negotiated, so that the MTA need not wait for each piece;
- the master says that work goes on, whether progress() is called or not.
"""

import json
import re
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..milter_client import OFFER
from . import scripts
from .conftest import Runner, Runners
from .wire import NOTHING, Session

pytestmark = pytest.mark.integration

Answers = list[tuple[bytes, bytes]]
Story = list[tuple[bytes, Answers]]
Called = tuple[str, str, tuple[str, ...]]

RECORD_TIMEOUT = 20.0

#: Content is not answered by itself, and its leading blank is kept for functions beside it.
CONTENT_BITS = 0x80 | 0x40000 | 0x80000 | 0x100000
SKIP = 0x400

#: Calls of which plain pymilter says that their text is not UTF-8, and which we carry out.
MENDED = {
    "getsymval": {"'{8bit}'"},
    "setreply": {"'\\udce9'"},
    "addheader": {"'\\udce9'"},
    "addrcpt": {"'\\udce9@example.com'"},
    "replacebody": {"'\\udce9'"},
}
MENDED_PACKETS = [(b"h", b"X-L\0\xe9\0"), (b"+", b"\xe9@example.com\0")]


def record_of(path: Path, *, closed: int = 1) -> list[dict[str, Any]]:
    """What the script has written, once its last connection is closed."""
    deadline = time.monotonic() + RECORD_TIMEOUT
    before = -1
    while True:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        count = sum(line["callback"] == "close" and line["method"] == "called" for line in lines)
        if count >= closed and len(lines) == before:
            return lines
        assert time.monotonic() < deadline, lines[-3:]
        before = len(lines)
        time.sleep(0.2)


def of_connections(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what ours does before it serves: an object that negotiates, and is closed."""
    closed = next(n for n, line in enumerate(lines) if key(line)[:2] == ("close", "called"))
    after = next(n for n in range(closed, len(lines)) if lines[n]["callback"] == "negotiate")
    return [line for line in lines[:after] if line["callback"] == "module"] + lines[after:]


def key(line: dict[str, Any]) -> Called:
    return line["callback"], line["method"], tuple(line["arguments"])


def outcome(line: dict[str, Any]) -> str:
    if "raised" in line:
        return f"{line['raised']}: {line['text']}"
    return str(line.get("returned"))


def with_plan(runner: Runner, folder: Path, plan: dict[str, Any], closed: int) -> Any:
    """What was sent, and what the script has written down."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    listen = f"unix:{folder}/milter.sock"
    record = folder / "record"
    script = scripts.everything(record, listen, json.dumps(plan))
    with runner(script, folder), Session(listen, OFFER) as session:
        story = [(b"O", session.negotiated), *session.play()]
        record_of(record, closed=closed)
    return story, [json.loads(line) for line in record.read_text().splitlines()]


def test_every_method_in_every_callback(runners: Runners, tmp_path: Path) -> None:
    plan = {"module": True}
    their_story, theirs = with_plan(runners.plain, tmp_path / "here", plan, 1)
    our_story, ours = with_plan(runners.one_worker, tmp_path / "here", plan, 2)
    ours = of_connections(ours)
    differences = []
    assert len(theirs) == len(ours)
    for their, our in zip(theirs, ours, strict=True):
        assert key(their) == key(our)
        if outcome(their) != outcome(our):
            differences.append((their, our))
    for their, our in differences:
        if their["method"] == "getdiag":  # how many contexts there were
            continue
        method = their["method"].removeprefix("ctx.")
        assert MENDED.get(method, set()) & set(their["arguments"]), (their, our)
        assert outcome(their).startswith("Unicode"), their
        allowed = ("None", "'caf\\udce9'", "error: cannot ")
        assert outcome(our).startswith(allowed), our
    mended = {their["method"] for their, _ in differences}
    assert mended - {"getdiag"} == set(MENDED)
    same_wire(their_story, our_story)


def same_wire(theirs: Story, ours: Story) -> None:
    (_, [(_, their_options)]), *theirs = theirs
    (_, [(_, our_options)]), *ours = ours
    same_options(their_options, our_options)
    for (letter, their), (our_letter, our) in zip(theirs, ours, strict=True):
        assert letter == our_letter
        if letter in b"LNB":
            assert (their, our) == ([(b"c", b"")], [])
        else:
            assert as_we_send(their) == [one for one in joined(our) if one not in MENDED_PACKETS]


def same_options(their: bytes, our: bytes) -> None:
    """Ours asks for the same, for content without answers, and for the usual macros besides."""
    words = [struct.unpack("!III", options[:12]) for options in (their, our)]
    assert words[0][:2] == words[1][:2]
    assert words[0][2] & ~SKIP == words[1][2] & ~CONTENT_BITS
    lists = [
        dict(re.findall(rb"(\0\0\0.)([^\0]*)\0", options[12:], re.S)) for options in (their, our)
    ]
    for stage, names in lists[0].items():
        wanted = names.replace(b",", b" ").split()
        assert set(wanted) <= set(lists[1].get(stage, b"").split()), stage


def joined(answers: Answers) -> Answers:
    """The pieces of a new body in one, where the first stands: Postfix gives up otherwise."""
    body = b"".join(payload for letter, payload in answers if letter == b"b").replace(
        b"\xe9y", b"y", 1
    )
    places = [n for n, (letter, _) in enumerate(answers) if letter == b"b"]
    found = [one for one in answers if one[0] != b"b"]
    return [*found[: places[0]], (b"b", body), *found[places[0] :]] if places else found


def as_we_send(answers: Answers) -> Answers:
    """What MTAs would stumble over is sent otherwise."""
    found = []
    for letter, payload in joined(answers):
        if letter in b"him":
            payload = payload.replace(b"\r\n", b"\n")  # MTAs fold at the bare LF
        elif letter == b"q":
            payload = re.sub(rb"[\r\n]+", b" ", payload)
        elif letter in b"2e":
            payload = re.sub(rb"\0\0\Z", b"\0", payload)  # no parameters
        if letter != b"p":
            found.append((letter, payload))
    return found


CALLBACKS = [
    "connect", "hello", "envfrom", "envrcpt", "unknown", "data", "header", "eoh", "body", "eom",
]  # fmt: skip
ANSWERS = [
    "CONTINUE", "ACCEPT", "REJECT", "DISCARD", "TEMPFAIL", "SKIP", "NOREPLY", "ALL_OPTS", "None",
    "'text'", "42", "-1", "True", "4294967297", "1.5", "raise",
]  # fmt: skip

LETTERS = dict(
    zip(CALLBACKS, (b"C", b"H", b"M", b"R", b"U", b"T", b"E", b"E", b"E", b"E"), strict=True)
)

#: What libmilter sends where ours sends something else.
DIFFERENT = ([NOTHING], [(b"a", b"")], [(b"d", b"")], [(b"s", b"")])

NO_VERDICTS = {"NOREPLY", "ALL_OPTS", "42", "-1"}
BEFORE_A_MESSAGE = {"connect", "hello", "unknown"}
UNTRAPPED = (b"y", b"451 4.3.0 pymilter: untrapped exception in everything\0")


def why_it_differs(callback: str, answer: str) -> str:
    """The reason, or nothing where all is the same."""
    if answer in NO_VERDICTS:
        return "the exception policy answers where libmilter leaves the MTA without an answer"
    if callback in BEFORE_A_MESSAGE and answer == "DISCARD":
        return "no MTA knows it there: the exception policy answers"
    if (callback, answer) == ("unknown", "ACCEPT"):
        return "it brings Postfix down: the exception policy answers"
    if answer == "SKIP" and callback != "body":
        return "Postfix goes on, and Sendmail knows it of the body alone: CONTINUE is sent"
    return ""


def told(story: Story) -> Story:
    """As an MTA learns it: content has one answer, at the end of the message."""
    found: Story = []
    for letter, answers in story:
        if letter in b"LNB":
            if answers not in ([], [(b"c", b"")], [(b"s", b"")]):
                found.append((b"E", answers))
        else:
            found.append((letter, answers))
    return found


def expected(theirs: Story, callback: str, answer: str) -> Story:
    """Their story with the difference that is meant."""
    reason = why_it_differs(callback, answer)
    if not reason:
        return told(theirs)
    found = []
    for letter, answers in told(theirs):
        if letter == LETTERS[callback] and answers in DIFFERENT:
            answers = [(b"c", b"")] if answer == "SKIP" else [UNTRAPPED]
        if answers == [NOTHING]:  # libmilter has lost its place, and the MTA waits for ever
            break
        found.append((letter, answers))
    return found


#: Plain pymilter leaves some of them without an answer; they need not wait one after the other.
CLIENTS = 20


def test_every_answer_of_every_callback(runners: Runners, tmp_path: Path) -> None:
    cases = {f"{c}-{n}.test": (c, a) for c in CALLBACKS for n, a in enumerate(ANSWERS)}
    plans = {name: {"answers": {c: a}} for name, (c, a) in cases.items()}
    plan = {"calls": [], "progress": [], "cases": plans}
    stories: dict[str, dict[str, Story]] = {}
    for name, runner in (("plain", runners.plain), ("ours", runners.sharded)):
        folder = tmp_path / name
        folder.mkdir()
        listen = f"unix:{folder}/milter.sock"

        def converse(case: str, listen: str = listen, name: str = name) -> Story:
            timeout = 1.0 if name == "plain" and why_it_differs(*cases[case]) else 20.0
            with Session(listen, OFFER, timeout) as session:
                return session.converse(case.encode())

        script = scripts.everything(folder / "record", listen, json.dumps(plan))
        with runner(script, folder), ThreadPoolExecutor(CLIENTS) as threads:
            stories[name] = dict(zip(cases, threads.map(converse, cases), strict=True))
    for case, (callback, answer) in cases.items():
        theirs, ours = stories["plain"][case], told(stories["ours"][case])
        wanted = expected(theirs, callback, answer)
        size = len(wanted) if theirs[-1][1] == [NOTHING] else None
        assert ours[:size] == wanted, (callback, answer, theirs, ours)


NOREPLY = ["connect", "hello", "envfrom", "envrcpt", "data", "unknown", "header", "eoh", "body"]


def called(lines: list[dict[str, Any]]) -> list[Called]:
    return [key(line) for line in lines if line["method"] == "called"]


def test_callbacks_without_reply(runners: Runners, tmp_path: Path) -> None:
    """They are called with the same, whoever waits.

    Of a message that is dropped before anybody had to answer, ours hears nothing.
    """
    plan = {"calls": [], "noreply": NOREPLY}
    _, theirs = with_plan(runners.plain, tmp_path / "here", plan, 1)
    _, ours = with_plan(runners.one_worker, tmp_path / "here", plan, 2)
    *all_theirs, envfrom, abort, close = called(theirs)
    assert (envfrom[0], abort[0], close[0]) == ("envfrom", "abort", "close")
    assert called(of_connections(ours)) == [*all_theirs, close]


def test_an_exception_where_no_reply_is_due_is_the_messages_verdict(
    runners: Runners, tmp_path: Path
) -> None:
    """libmilter ignores the rest of the message, its end included, and the MTA waits for ever."""
    callbacks = NOREPLY[2:]
    cases = {f"{callback}.test": {"answers": {callback: "raise"}} for callback in callbacks}
    plan = {"calls": [], "noreply": NOREPLY, "cases": cases}
    listen = f"unix:{tmp_path}/milter.sock"
    script = scripts.everything(tmp_path / "record", listen, json.dumps(plan))
    stories = {}
    with runners.sharded(script, tmp_path):
        for callback in callbacks:
            with Session(listen) as session:
                stories[callback] = dict(session.converse(f"{callback}.test".encode()))
    unknown = stories.pop("unknown")  # which is none of the message's, and answered in any case
    assert (unknown[b"U"], unknown[b"E"]) == ([UNTRAPPED], [(b"c", b"")])
    verdicts = {callback: story[b"E"] for callback, story in stories.items()}
    assert verdicts == {callback: [UNTRAPPED] for callback in stories}


EIGHT_BIT = [
    (
        b"C",
        b"client\xe9.test\x004" + struct.pack("!H", 25) + b"192.0.2.1\0",
        "'client\\udce9.test'",
    ),
    (b"H", b"caf\xe9\0", "'caf\\udce9'"),
    (b"U", b"FROB \xe9\0", "'FROB \\udce9'"),
    (b"M", b"<\xe9@example.org>\0", "'<\\udce9@example.org>'"),
    (b"R", b"<\xe9@example.com>\0", "'<\\udce9@example.com>'"),
    (b"T", b"", ""),
    (b"L", b"X-\xe9\0\xe9\0", "'X-\\udce9'"),
    (b"E", b"", ""),
]

#: Where plain pymilter answers instead of the script.
UNDECODED = {b"C", b"H", b"U", b"L"}


@pytest.mark.parametrize("name", ["plain", "one_worker"])
def test_bytes_that_are_not_utf_8(name: str, runners: Runners, tmp_path: Path) -> None:
    """Ours shows them to the script."""
    listen = f"unix:{tmp_path}/milter.sock"
    record = tmp_path / "record"
    script = scripts.everything(record, listen, json.dumps({"calls": [], "progress": []}))
    with getattr(runners, name)(script, tmp_path), Session(listen) as session:
        # A header field that was not decoded is the message's end for libmilter.
        asked = EIGHT_BIT[:-1] if name == "plain" else EIGHT_BIT
        answers = {letter: session.ask(letter, payload) for letter, payload, _ in asked}
    seen = [argument for _, _, arguments in called(record_of(record)) for argument in arguments]
    for letter, _, argument in asked:
        if name == "plain" and letter in UNDECODED:
            assert argument not in seen
            assert answers[letter] == [UNTRAPPED] or letter == b"L"
        else:
            assert not argument or argument in seen, letter
            assert answers[letter] in ([], [(b"c", b"")]) or name == "plain", letter
