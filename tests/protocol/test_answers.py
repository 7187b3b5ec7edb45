"""What may be sent to an MTA: every reply at every stage, and the order of an answer."""

from __future__ import annotations

import re
import tracemalloc
from itertools import product

import pytest
from cells import every, rows

from sharded_milter.errors import LocalProtocolError
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.stages import Actions, Protocol, Stage

from .strategies import agreement, packet

# One well-formed reply for each letter, and a few that are never sent.
SAMPLES = {
    "c": packet("c"),
    "a": packet("a"),
    "r": packet("r"),
    "t": packet("t"),
    "y": packet("y", b"550 5.7.1 no\0"),
    "d": packet("d"),
    "s": packet("s"),
    "p": packet("p"),
    "h": packet("h", b"X-Added\0v\0"),
    "i": packet("i", b"\0\0\0\0X-Top\0t\0"),
    "m": packet("m", b"\0\0\0\1Subject\0new subject\0"),
    "b": packet("b", b"new body\r\n"),
    "+": packet("+", b"<dave@example.net>\0"),
    "2": packet("2", b"<erin@example.net>\0NOTIFY=NEVER\0"),
    "-": packet("-", b"<bob@example.net>\0"),
    "e": packet("e", b"<new@example.org>\0"),
    "q": packet("q", b"suspicious\0"),
    "f": packet("f"),
    "4": packet("4"),
    "l": packet("l", b"\0\0\0\0i\0"),
}
FINAL = "cartyds"

# `F` is a final reply that is legal, `x` one that may come before it, a dot is never legal.
# f (CONN_FAIL), 4 (SHUTDOWN) and l (SETSYMLIST) are never sent.
STAGES = """
        | c | a | r | t | y | d | s | p | h | i | m | b | + | 2 | - | e | q | f | 4 | l
CONNECT | F | F | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | . | . | .
HELO    | F | F | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | . | . | .
MAIL    | F | F | F | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | . | .
RCPT    | F | F | F | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | . | .
DATA    | F | F | F | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | . | .
HEADER  | F | F | F | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | . | .
EOH     | F | F | F | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | . | .
BODY    | F | F | F | F | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | .
EOM     | F | F | F | F | F | F | . | x | x | x | x | x | x | x | x | x | x | . | . | .
UNKNOWN | F | . | F | F | F | . | . | . | . | . | . | . | . | . | . | . | . | . | . | .
"""

# The action that each change needs.
ACTIONS = {
    "h": Actions.ADDHDRS,
    "i": Actions.ADDHDRS,
    "m": Actions.CHGHDRS,
    "b": Actions.CHGBODY,
    "+": Actions.ADDRCPT,
    "2": Actions.ADDRCPT_PAR,
    "-": Actions.DELRCPT,
    "e": Actions.CHGFROM,
    "q": Actions.QUARANTINE,
}
EVERYTHING = agreement(Protocol.SKIP)
CONTINUE = SAMPLES["c"]


def cells() -> list[tuple[Stage, str, str]]:
    header, *rows = [line.split("|") for line in STAGES.strip("\n").splitlines()]
    return [
        (Stage[name.strip()], letter.strip(), cell.strip())
        for name, *row in rows
        for letter, cell in zip(header[1:], row, strict=True)
    ]


def refused(stage: Stage, replies: bytes, match: str, protocol: int = Protocol.SKIP) -> None:
    with pytest.raises(LocalProtocolError, match=match):
        check_replies(stage, replies, agreement(protocol))


def test_the_matrix_has_every_stage_and_every_reply() -> None:
    assert {(stage, letter) for stage, letter, _ in cells()} == set(product(Stage, SAMPLES))


@rows(cells())
def test_a_reply_is_sent_only_where_its_cell_says(stage: Stage, letter: str, expected: str) -> None:
    reply = SAMPLES[letter]
    match expected:
        case "F":
            assert check_replies(stage, reply, EVERYTHING) == ord(letter)
        case "x":
            assert check_replies(stage, reply + CONTINUE, EVERYTHING) == ord("c")
            refused(stage, reply, "no final reply")
        case _:
            refused(stage, reply, "not legal|does not exist")
            refused(stage, reply + CONTINUE, "not legal|does not exist|after the final")


@every([chr(c) for c in range(256) if chr(c) not in SAMPLES])
def test_a_letter_that_is_no_reply_is_never_sent(letter: str) -> None:
    refused(Stage.EOM, packet(letter), "does not exist")


@pytest.mark.parametrize(("letter", "action"), list(ACTIONS.items()))
def test_a_change_needs_its_action_and_no_other(letter: str, action: Actions) -> None:
    alone = agreement(actions=action)
    assert check_replies(Stage.EOM, SAMPLES[letter] + CONTINUE, alone) == ord("c")
    others = agreement(actions=0x1FF & ~action)
    with pytest.raises(LocalProtocolError, match=f"{action.name} was not negotiated"):
        check_replies(Stage.EOM, SAMPLES[letter] + CONTINUE, others)


def test_skip_needs_its_option() -> None:
    refused(Stage.BODY, SAMPLES["s"], "SKIP was not negotiated", protocol=0)


@every(FINAL.replace("s", ""), FINAL + "phb")
def test_nothing_comes_after_the_final_reply(final: str, second: str) -> None:
    refused(Stage.EOM, SAMPLES[final] + SAMPLES[second], "after the final one")


def test_no_answer_is_no_answer() -> None:
    refused(Stage.MAIL, b"", "no final reply")


@pytest.mark.parametrize("between", "phim+2-eq")
def test_the_new_body_is_one_unbroken_run(between: str) -> None:
    body, other = SAMPLES["b"], SAMPLES[between]
    refused(Stage.EOM, body + other + body + CONTINUE, "interrupted")
    run = other + body * 3 + other + CONTINUE
    assert check_replies(Stage.EOM, run, EVERYTHING) == ord("c")


def test_a_reply_carries_at_most_65535_bytes() -> None:
    full = packet("b", b"x" * 65535)
    assert check_replies(Stage.EOM, full + full + CONTINUE, EVERYTHING) == ord("c")
    refused(Stage.EOM, packet("b", b"x" * 65536) + CONTINUE, "65536 bytes exceeds 65535")
    refused(Stage.EOM, packet("h", b"X\0" + b"x" * 65533 + b"\0") + CONTINUE, "exceeds 65535")


@pytest.mark.parametrize("cut", [1, 4, 5, 8])
def test_packets_that_are_cut_off_are_not_sent(cut: int) -> None:
    refused(Stage.EOM, SAMPLES["h"][:cut], "malformed reply at eom")
    refused(Stage.EOM, CONTINUE + SAMPLES["h"][:cut], "after the final|malformed")


def test_a_length_that_no_packet_has_is_not_sent() -> None:
    refused(Stage.EOM, b"\0\0\0\0c", "malformed reply at eom: packet length 0")


# Postfix hangs up on each of these, and Sendmail ignores some of them without a word.
MALFORMED = [
    *((letter, b"\0") for letter in "cartdp"),
    ("h", b"X-Added\0v"),
    ("h", b"X-Added\0v\0more\0"),
    ("h", b"\0v\0"),
    ("h", b"X\r\nBcc\0v\0"),
    ("h", b"X\nBcc\0v\0"),
    ("i", b"\0\0\0"),
    ("i", b"\0\0\0\0X-Top\0"),
    ("i", b"\0\0\0\0\0t\0"),
    ("m", b"\0\0\0\1\0new\0"),
    ("m", b"\0\0\0\1Subject\0new"),
    ("+", b"<a@b>"),
    ("+", b"\0"),
    ("+", b"<a@b>\0<c@d>\0"),
    ("+", b"<a@b>\r\n\0"),
    ("2", b"<a@b>\0NOTIFY=NEVER\0ORCPT=x\0"),
    ("2", b"<a@b>\0\0"),
    ("-", b"\0"),
    ("e", b""),
    ("e", b"\0"),
    ("e", b"<a@b>\0RET=HDRS"),
    ("q", b""),
    ("q", b"\0"),
    ("q", b"two\nlines\0"),
    ("q", b"no nul"),
]


@pytest.mark.parametrize(("letter", "payload"), MALFORMED)
def test_a_malformed_reply_is_not_sent(letter: str, payload: bytes) -> None:
    refused(Stage.EOM, packet(letter, payload), re.escape(f"malformed reply '{letter}' at eom"))


@pytest.mark.parametrize(
    ("letter", "payload"),
    [
        ("h", b"X-Empty\0\0"),
        ("h", b"X-Folded\0a\n\tb\xff\0"),
        ("m", b"\0\0\0\1Date\0\0"),
        ("m", b"\xff\xff\xff\xffDate\0x\0"),
        ("b", b""),
        ("b", b"\0\xff\r"),
        ("2", b"<a@b>\0"),
        ("e", b"<>\0"),
        ("e", b"<a@b>\0RET=HDRS ENVID=x\0"),
    ],
)
def test_what_looks_odd_but_is_legal_is_sent(letter: str, payload: bytes) -> None:
    assert check_replies(Stage.EOM, packet(letter, payload) + CONTINUE, EVERYTHING) == ord("c")


def test_a_large_answer_is_checked_where_it_lies() -> None:
    answer = packet("b", bytes(65_535)) * 64 + CONTINUE
    check_replies(Stage.EOM, CONTINUE, EVERYTHING)  # what is worked out once is there
    tracemalloc.start()
    assert check_replies(Stage.EOM, answer, EVERYTHING) == ord("c")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 65_535
