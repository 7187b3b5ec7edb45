"""The changes of a message: the packet of each call, their order, and refused calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.dialects.libmilter.changes import Changes
from sharded_milter.errors import CallRefused
from sharded_milter.protocol import replies
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.commands import Negotiate
from sharded_milter.protocol.negotiation import Agreement
from sharded_milter.protocol.stages import Actions, Stage
from sharded_milter.protocol.wire import MAX_CHUNK, frame

ALL = Actions(0xFF)
Call = tuple[Callable[..., None], tuple[Any, ...]]


def changes(granted: Actions = ALL, space: str = "") -> Changes:
    made = Changes()
    made.granted, made.space = granted, space
    return made


def done(*calls: Call, space: str = "") -> bytes:
    made = changes(space=space)
    for method, arguments in calls:
        method(made, "smfi", *arguments)
    return made.packets()


def index(number: int) -> bytes:
    return number.to_bytes(4, "big")


def names(cases: Iterable[tuple[Any, ...]]) -> list[str]:
    """Return names of cases without addresses of objects, equal in every process."""
    return [f"{number}-{case[0].__name__}" for number, case in enumerate(cases)]


ONE_PACKET: list[tuple[Callable[..., None], tuple[Any, ...], bytes, Actions]] = [
    (Changes.add_header, ("X", "v"), frame(b"h", b"X\0v\0"), Actions.ADDHDRS),
    (Changes.add_header, ("X", ""), frame(b"h", b"X\0\0"), Actions.ADDHDRS),
    (Changes.insert_header, (0, "X", "v"), frame(b"i", index(0) + b"X\0v\0"), Actions.ADDHDRS),
    (Changes.change_header, ("X", 2, "v"), frame(b"m", index(2) + b"X\0v\0"), Actions.CHGHDRS),
    (Changes.change_header, ("X", 1, None), frame(b"m", index(1) + b"X\0\0"), Actions.CHGHDRS),
    (Changes.change_header, ("X", 1, ""), frame(b"m", index(1) + b"X\0\0"), Actions.CHGHDRS),
    (Changes.change_sender, ("<a@b>", None), frame(b"e", b"<a@b>\0"), Actions.CHGFROM),
    (Changes.change_sender, ("a@b", ""), frame(b"e", b"a@b\0"), Actions.CHGFROM),
    (Changes.change_sender, ("a@b", "R=1 E=2"), frame(b"e", b"a@b\0R=1 E=2\0"), Actions.CHGFROM),
    (Changes.add_recipient, ("a@b",), frame(b"+", b"a@b\0"), Actions.ADDRCPT),
    (Changes.add_recipient_with, ("a@b", None), frame(b"2", b"a@b\0"), Actions.ADDRCPT_PAR),
    (Changes.add_recipient_with, ("a@b", "N=1"), frame(b"2", b"a@b\0N=1\0"), Actions.ADDRCPT_PAR),
    (Changes.delete_recipient, ("a@b",), frame(b"-", b"a@b\0"), Actions.DELRCPT),
    (Changes.replace_body, (b"new\r\n",), frame(b"b", b"new\r\n"), Actions.CHGBODY),
    (Changes.replace_body, (bytearray(b"new"),), frame(b"b", b"new"), Actions.CHGBODY),
    (Changes.replace_body, (memoryview(b"new"),), frame(b"b", b"new"), Actions.CHGBODY),
    (Changes.replace_body, (b"",), frame(b"b"), Actions.CHGBODY),
    (Changes.quarantine, ("odd",), frame(b"q", b"odd\0"), Actions.QUARANTINE),
]  # fmt: skip
every_packet = pytest.mark.parametrize(
    ("method", "arguments", "packet", "action"), ONE_PACKET, ids=names(ONE_PACKET)
)


@every_packet
def test_a_call_is_one_packet(
    method: Callable[..., None], arguments: tuple[Any, ...], packet: bytes, action: Actions
) -> None:
    assert done((method, arguments)) == packet


@every_packet
def test_an_action_that_was_not_granted_is_refused(
    method: Callable[..., None], arguments: tuple[Any, ...], packet: bytes, action: Actions
) -> None:
    made = changes(granted=ALL & ~action)
    with pytest.raises(CallRefused) as refused:
        method(made, "smfi_x", *arguments)
    assert str(refused.value) == (
        f"smfi_x: the action {action.name} was not negotiated with the MTA"
    )
    assert made.packets() == b""
    made.granted = action
    method(made, "smfi_x", *arguments)
    assert made.packets() == packet


def test_packets_come_in_the_order_of_the_calls() -> None:
    calls = [
        (method, arguments) for method, arguments, packet, _ in ONE_PACKET if packet[4:5] != b"b"
    ]
    assert done(*calls) == b"".join(p for _, _, p, _ in ONE_PACKET if p[4:5] != b"b")
    assert done(*reversed(calls)) == b"".join(
        p for _, _, p, _ in ONE_PACKET[::-1] if p[4:5] != b"b"
    )


def test_the_pieces_of_the_body_come_in_one_run_where_the_first_was() -> None:
    assert done(
        (Changes.add_recipient, ("a",)),
        (Changes.replace_body, (b"one",)),
        (Changes.add_recipient, ("b",)),
        (Changes.replace_body, (b"two",)),
        (Changes.add_recipient, ("c",)),
    ) == b"".join([frame(b"+", b"a\0"), frame(b"b", b"onetwo"), frame(b"+", b"b\0"),
                   frame(b"+", b"c\0")])  # fmt: skip


@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (0, [0]),
        (1, [1]),
        (MAX_CHUNK, [MAX_CHUNK]),
        (MAX_CHUNK + 1, [MAX_CHUNK, 1]),
        (2 * MAX_CHUNK, [MAX_CHUNK, MAX_CHUNK]),
    ],
)
def test_a_large_body_goes_in_full_pieces(size: int, pieces: list[int]) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    sent, at = done((Changes.replace_body, (body[:size],))), 0
    for piece in pieces:
        assert sent.startswith(frame(b"b", body[at : at + piece]))
        sent, at = sent[5 + piece :], at + piece
    assert sent == b""


def test_a_value_begins_with_the_blank_that_was_agreed() -> None:
    sent = done(
        (Changes.add_header, ("X", "v")),
        (Changes.insert_header, (1, "X", " v")),
        (Changes.change_header, ("X", 1, "v")),
        (Changes.change_header, ("X", 1, "")),
        space=" ",
    )
    assert sent == b"".join([frame(b"h", b"X\0 v\0"), frame(b"i", index(1) + b"X\0  v\0"),
        frame(b"m", index(1) + b"X\0 v\0"), frame(b"m", index(1) + b"X\0\0")])  # fmt: skip


@pytest.mark.parametrize("folded", ["a\n\tb", "a\r\n\tb", "a\r\tb"], ids=ascii)
def test_a_value_is_folded_with_bare_lf(folded: str) -> None:
    assert done((Changes.add_header, ("X", folded))) == frame(b"h", b"X\0a\n\tb\0")


def test_any_byte_but_nul_can_be_sent_in_a_value() -> None:
    assert done((Changes.add_header, ("X", "caf\udce9"))) == frame(b"h", b"X\0caf\xe9\0")


REFUSED: list[tuple[Callable[..., None], tuple[Any, ...], str]] = [
    (Changes.add_header, ("", "v"), r"smfi_x: b'\x00v\x00' cannot be sent: a name"),
    (Changes.add_header, ("a\nb", "v"), r"smfi_x: b'a\nb\x00v\x00' cannot be sent: a name"),
    (Changes.add_header, ("X", "a\0b"), r"smfi_x: b'X\x00a\x00b\x00' cannot be sent: a name"),
    (Changes.add_header, (None, "v"), "smfi_x: None is not a str"),
    (Changes.add_header, ("X", 5), "smfi_x: 5 is not a str"),
    (Changes.add_header, ("X", b"v"), "smfi_x: b'v' is not a str"),
    (Changes.add_header, ("X", "\ud800"), r"smfi_x: '\ud800' cannot be encoded as UTF-8"),
    (Changes.add_header, ("X", "v" * MAX_CHUNK), f"the values have {MAX_CHUNK + 3} bytes; a"),
    (Changes.insert_header, (-1, "X", "v"), "smfi_x: index -1 is not between 0 and 2147483647"),
    (Changes.insert_header, (2**31, "X", "v"), f"smfi_x: index {2**31} is not between 0 and"),
    (Changes.change_header, ("X", "1", "v"), "smfi_x: index '1' is not between 0 and 2147483647"),
    (Changes.change_header, ("X", None, "v"), "smfi_x: index None is not between 0 and"),
    (Changes.change_header, ("X", 1, 7), "smfi_x: 7 is not a str"),
    (Changes.change_sender, ("", None), r"smfi_x: b'\x00' cannot be sent: a name"),
    (Changes.change_sender, ("a", 7), "smfi_x: 7 is not a str"),
    (Changes.change_sender, ("a", "R=1\0E=2"), "cannot be sent: a name"),
    (Changes.add_recipient, ("",), r"smfi_x: b'\x00' cannot be sent: a name"),
    (Changes.add_recipient, ("a\r\nb",), "cannot be sent: a name"),
    (Changes.add_recipient_with, ("a", "N=1\nO=2"), "cannot be sent: a name"),
    (Changes.delete_recipient, (("a", "b"),), "smfi_x: ('a', 'b') is not a str"),
    (Changes.replace_body, ("text",), "smfi_x: the body must be bytes, not str"),
    (Changes.replace_body, (None,), "smfi_x: the body must be bytes, not NoneType"),
    (Changes.quarantine, ("",), r"smfi_x: b'\x00' cannot be sent: a name"),
    (Changes.quarantine, (None,), "smfi_x: None is not a str"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "arguments", "text"), REFUSED, ids=names(REFUSED))
def test_what_cannot_be_sent_is_refused_and_changes_nothing(
    method: Callable[..., None], arguments: tuple[Any, ...], text: str
) -> None:
    made = changes()
    made.add_recipient("first", "a@b")
    with pytest.raises(CallRefused) as refused:
        method(made, "smfi_x", *arguments)
    assert text in str(refused.value)
    assert made.packets() == frame(b"+", b"a@b\0")


def test_the_next_message_has_none_of_the_changes() -> None:
    made = changes()
    made.replace_body("x", b"body")
    made.quarantine("x", "odd")
    made.clear()
    assert made.packets() == b""
    made.replace_body("x", b"new")
    assert made.packets() == frame(b"b", b"new")


text = st.one_of(
    st.text(max_size=4),
    st.sampled_from(["", "X", "a@b", "\0", "\r\n", "\udce9", "\ud800", "v" * 65_533, "v" * 70_000]),
)
anything = st.one_of(text, st.none(), st.binary(max_size=2), st.integers())
numbers = st.one_of(st.integers(-1, 3), st.sampled_from([2**31 - 1, 2**31, 2**40]), anything)
body = st.one_of(st.binary(max_size=3), st.just(b"x" * (MAX_CHUNK + 1)), anything)
calls = st.lists(
    st.one_of(
        st.tuples(st.just(Changes.add_header), st.tuples(text, text)),
        st.tuples(st.just(Changes.insert_header), st.tuples(numbers, text, text)),
        st.tuples(st.just(Changes.change_header), st.tuples(text, numbers, anything)),
        st.tuples(st.just(Changes.change_sender), st.tuples(text, anything)),
        st.tuples(st.just(Changes.add_recipient), st.tuples(anything)),
        st.tuples(st.just(Changes.add_recipient_with), st.tuples(text, anything)),
        st.tuples(st.just(Changes.delete_recipient), st.tuples(text)),
        st.tuples(st.just(Changes.replace_body), st.tuples(body)),
        st.tuples(st.just(Changes.quarantine), st.tuples(anything)),
    ),
    max_size=8,
)


@given(calls, st.integers(0, 0xFF), st.sampled_from(["", " "]))
def test_whatever_an_author_calls_is_a_legal_answer(
    made_calls: list[Call], granted: int, space: str
) -> None:
    made = changes(Actions(granted), space)
    agreement = Agreement(Negotiate(6, granted, 0), {}, frozenset())
    for method, arguments in made_calls:
        before, refusal = made.packets(), ""
        try:
            method(made, "smfi_x", *arguments)
        except CallRefused as error:
            refusal = str(error)
        if refusal:
            assert refusal.startswith("smfi_x: ")
            assert made.packets() == before
        answer = made.packets() + replies.Continue().encode()
        assert check_replies(Stage.EOM, answer, agreement) == ord("c")
