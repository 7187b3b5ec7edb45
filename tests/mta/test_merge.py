"""Several milters' answers become one: told by examples, and for every pair of verdicts."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_mta import packed

from sharded_milter.mta.merge import merge
from sharded_milter.protocol import replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import (
    Accept,
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    Continue,
    DeleteRecipient,
    InsertHeader,
    Quarantine,
    ReplaceBody,
)
from sharded_milter.protocol.wire import Framer

GO_ON: list[Packet] = [Continue(), Accept()]


def together(*answers: list[Packet], accept: bool = False) -> list[Packet]:
    """Return the packets that the MTA gets."""
    answer, _ = merge([packed(*answer) for answer in answers], accept=accept)
    return [replies.parse_reply(packet) for packet in Framer().receive(answer)]


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("first", GO_ON, ids=repr)
@pytest.mark.parametrize("second", GO_ON, ids=repr)
def test_the_last_word_is_accept_only_if_all_are_done(
    first: Packet, second: Packet, accept: bool
) -> None:
    assert together([first], [second], accept=accept) == [Accept() if accept else Continue()]


def test_the_actions_of_all_come_in_the_order_of_the_milters() -> None:
    a = [AddHeader("X-A", "1"), Quarantine("a"), Accept()]
    b = [InsertHeader(0, "X-B", "1"), Continue()]
    c = [ChangeSender("<c@x>"), AddHeader("X-C", "1"), Accept()]
    assert together(a, b, c) == [*a[:2], *b[:1], *c[:2], Continue()]


def test_one_milters_actions_stay_as_they_are() -> None:
    own: list[Packet] = [
        AddHeader("X", "1"), ChangeHeader(1, "X", ""), ChangeHeader(2, "X", "2"),
        AddRecipient("<a>"), AddRecipient("<a>"),
    ]  # fmt: skip
    assert together([Continue()], [*own, Accept()]) == [*own, Continue()]


def test_only_the_first_new_body_is_taken() -> None:
    pieces: list[Packet] = [ReplaceBody(b"a"), ReplaceBody(b"b")]
    others: list[Packet] = [AddHeader("X", "1"), ReplaceBody(b"c")]
    answer, left_out = merge(
        [packed(Continue()), packed(*pieces, Accept()), packed(*others, Accept()),
         packed(ReplaceBody(b"d"), Continue())],
        accept=False,
    )  # fmt: skip
    assert answer == packed(*pieces, AddHeader("X", "1"), Continue())
    assert left_out == 2


def test_header_fields_are_meant_as_every_milter_saw_them() -> None:
    """Postfix counts anew after each deletion, so those come last, from below."""
    a: list[Packet] = [AddHeader("Y", "a"), ChangeHeader(1, "X", ""), Continue()]
    b: list[Packet] = [ChangeHeader(2, "x", ""), ChangeHeader(3, "X", "new"), Continue()]
    c: list[Packet] = [ChangeHeader(0, "X", ""), Continue()]  # 0 is the first, as 1 is
    assert together(a, b, c) == [
        ChangeHeader(3, "X", "new"),
        ChangeHeader(2, "x", ""),
        ChangeHeader(0, "X", ""),
        AddHeader("Y", "a"),
        Continue(),
    ]


def test_a_milter_that_changes_what_it_has_added_means_its_own_field() -> None:
    a: list[Packet] = [InsertHeader(0, "X", "a"), ChangeHeader(1, "x", "b"), Continue()]
    b: list[Packet] = [ChangeHeader(1, "X", "c"), AddHeader("X", "d"), Continue()]
    assert together(a, b) == [b[0], *a[:2], b[1], Continue()]


@pytest.mark.parametrize("action", [AddRecipient("<a>"), DeleteRecipient("<a>")], ids=repr)
def test_what_two_milters_say_of_a_recipient_is_said_once(action: Packet) -> None:
    other = AddRecipient("<b>")
    assert together([action, Continue()], [other, action, Accept()]) == [action, other, Continue()]


def test_what_a_milter_has_undone_another_may_do_again() -> None:
    a: list[Packet] = [AddRecipient("<r>"), DeleteRecipient("<r>"), Continue()]
    b: list[Packet] = [AddRecipient("<r>"), Continue()]
    assert together(a, b) == [*a[:2], b[0], Continue()]


ACTIONS = st.one_of(
    st.builds(AddHeader, st.sampled_from("XYZ"), st.text("abc")),
    st.builds(InsertHeader, st.integers(0, 3), st.sampled_from("XYZ"), st.text("abc")),
    st.builds(ChangeHeader, st.integers(0, 3), st.sampled_from("XYZ"), st.text("abc")),
    st.builds(AddRecipient, st.sampled_from(["<a>", "<b>"])),
    st.builds(Quarantine, st.sampled_from("XYZ")),
)


@given(st.lists(st.lists(ACTIONS, max_size=6), min_size=1, max_size=4))
def test_nothing_is_lost_but_repeats_and_the_rest_keeps_its_order(
    lists: list[list[Packet]],
) -> None:
    merged_actions = together(*([*actions, Continue()] for actions in lists))[:-1]
    said = [action for actions in lists for action in actions]
    assert set(merged_actions) <= set(said)
    fixed = [action for action in said if isinstance(action, AddHeader | InsertHeader | Quarantine)]
    assert [a for a in merged_actions if isinstance(a, type(fixed[0]) if fixed else int)] == [
        a for a in fixed if isinstance(a, type(fixed[0]))
    ]
    values = {(a.name, a.value) for a in said if isinstance(a, ChangeHeader) and a.value}
    assert values == {
        (a.name, a.value) for a in merged_actions if isinstance(a, ChangeHeader) and a.value
    }


def test_every_pair_of_kinds_has_an_order() -> None:
    kinds: list[Packet] = [AddHeader("A", "1"), AddRecipient("<a>"), ChangeSender("<s>"),
                           DeleteRecipient("<d>"), InsertHeader(0, "I", "1"), Quarantine("q"),
                           ReplaceBody(b"body")]  # fmt: skip
    for first, second in combinations(kinds, 2):
        for pair in ((first, second), (second, first)):
            assert together([pair[0], Continue()], [pair[1], Accept()]) == [*pair, Continue()]
