"""Encoding verdicts: the packet of each action, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter import (
    Accept,
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    DeleteHeader,
    DeleteRecipient,
    Discard,
    InsertHeader,
    Quarantine,
    Reject,
    ReplaceBody,
    TempFail,
    Verdict,
)
from sharded_milter.api.verdicts import Action
from sharded_milter.dialects.functions.dialect import ALL_ACTIONS
from sharded_milter.dialects.functions.replies import LAST, action_packets, to_replies
from sharded_milter.protocol import replies
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.commands import Negotiate
from sharded_milter.protocol.negotiation import Agreement
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import NO_PROTOCOL, Actions, Protocol, Stage
from sharded_milter.protocol.wire import MAX_CHUNK, frame

LEADSPC = Protocol.HDR_LEADSPC


def packets(*actions: Action, protocol: Protocol = NO_PROTOCOL) -> list[Packet]:
    return list(action_packets(actions, protocol))


@pytest.mark.parametrize(
    ("verdict", "packet"),
    [
        (None, frame(b"c")),
        (Accept(), frame(b"a")),
        (Discard(), frame(b"d")),
        (Reject("no"), frame(b"y", b"550 5.7.1 no\0")),
        (Reject("100 %", 554, "5.6.0"), frame(b"y", b"554 5.6.0 100 %%\0")),
        (TempFail("later"), frame(b"y", b"451 4.7.1 later\0")),
        (TempFail("go", 421, "4.3.2"), frame(b"y", b"421 4.3.2 go\0")),
        (Reject("a\nb"), frame(b"y", b"550-5.7.1 a\r\n550 5.7.1 b\0")),
    ],
    ids=str,
)
def test_a_verdict_is_one_packet(verdict: Verdict, packet: bytes) -> None:
    assert to_replies(verdict, NO_PROTOCOL) == packet


ONE_PACKET: list[tuple[Action, Packet]] = [
    (AddHeader("X", "v"), replies.InsertHeader(LAST, "X", "v")),
    (InsertHeader(0, "X", "v"), replies.InsertHeader(0, "X", "v")),
    (ChangeHeader("X", 2, "v"), replies.ChangeHeader(2, "X", "v")),
    (DeleteHeader("X", 2), replies.ChangeHeader(2, "X", "")),
    (AddRecipient("a@b"), replies.AddRecipient("<a@b>")),
    (AddRecipient("<a@b>"), replies.AddRecipient("<a@b>")),
    (AddRecipient("a@b", ("N=1", "O=2")), replies.AddRecipientPar("<a@b>", ("N=1 O=2",))),
    (DeleteRecipient("a@b"), replies.DeleteRecipient("<a@b>")),
    (DeleteRecipient("<a@b>"), replies.DeleteRecipient("<a@b>")),
    (ChangeSender("a@b"), replies.ChangeSender("<a@b>")),
    (ChangeSender(""), replies.ChangeSender("<>")),
    (ChangeSender("a@b", ("R=1", "E=2")), replies.ChangeSender("<a@b>", ("R=1 E=2",))),
    (ReplaceBody(b"new\r\n"), replies.ReplaceBody(b"new\r\n")),
    (ReplaceBody(b""), replies.ReplaceBody(b"")),
    (Quarantine("odd"), replies.Quarantine("odd")),
]  # fmt: skip


@pytest.mark.parametrize(("action", "packet"), ONE_PACKET, ids=str)
def test_an_action_is_one_packet(action: Action, packet: Packet) -> None:
    assert packets(action) == [packet]


WITH_VALUE = [AddHeader("X", "v"), InsertHeader(3, "X", "v"), ChangeHeader("X", 1, "v")]


@pytest.mark.parametrize("action", WITH_VALUE, ids=str)
def test_the_blank_behind_the_colon_is_ours_where_that_was_agreed(action: Action) -> None:
    sent: Any = packets(action, protocol=LEADSPC)
    assert [packet.value for packet in sent] == [" v"]


def test_a_deletion_stays_empty_whatever_was_agreed() -> None:
    assert packets(DeleteHeader("X"), protocol=LEADSPC) == [replies.ChangeHeader(1, "X", "")]


@pytest.mark.parametrize("folded", ["a\n\tb", "a\r\n\tb", "a\r\tb"], ids=ascii)
def test_a_value_is_folded_with_bare_lf(folded: str) -> None:
    sent: Any = packets(AddHeader("X", folded), ChangeHeader("X", 1, folded))
    assert [packet.value for packet in sent] == ["a\n\tb", "a\n\tb"]


@pytest.mark.parametrize(
    "sizes",
    [[1], [MAX_CHUNK], [MAX_CHUNK, 1], [MAX_CHUNK, MAX_CHUNK], [MAX_CHUNK, MAX_CHUNK, 7]],
    ids=str,
)
def test_a_large_body_goes_in_full_pieces(sizes: list[int]) -> None:
    body = bytes(range(256)) * (sum(sizes) // 256 + 1)
    sent: Any = packets(ReplaceBody(body[: sum(sizes)]))
    assert [len(packet.chunk) for packet in sent] == sizes
    assert b"".join(packet.chunk for packet in sent) == body[: sum(sizes)]


def test_changes_come_first_then_deletions_from_the_last_then_the_rest_in_its_order() -> None:
    sent = packets(
        AddHeader("A", "1"),
        DeleteHeader("X", 1),
        Quarantine("odd"),
        ChangeHeader("B", 2, "2"),
        DeleteHeader("Y", 3),
        AddRecipient("a@b"),
        DeleteHeader("X", 2),
        ChangeHeader("B", 1, "1"),
        InsertHeader(0, "T", "top"),
    )
    assert sent == [
        replies.ChangeHeader(2, "B", "2"),
        replies.ChangeHeader(1, "B", "1"),
        replies.ChangeHeader(3, "Y", ""),
        replies.ChangeHeader(2, "X", ""),
        replies.ChangeHeader(1, "X", ""),
        replies.InsertHeader(LAST, "A", "1"),
        replies.Quarantine("odd"),
        replies.AddRecipient("<a@b>"),
        replies.InsertHeader(0, "T", "top"),
    ]


def test_a_deletion_that_is_said_twice_is_done_once() -> None:
    sent = packets(DeleteHeader("X", 1), DeleteHeader("x", 1), DeleteHeader("X", 2))
    assert sent == [replies.ChangeHeader(2, "X", ""), replies.ChangeHeader(1, "X", "")]


def deleted_by(mta_renumbers: bool, sent: Sequence[Packet], count: int) -> list[int]:
    """Return which of `count` fields are left, with the MTA's way of counting."""
    fields: list[int | None] = list(range(1, count + 1))
    for packet in sent:
        assert isinstance(packet, replies.ChangeHeader)
        if mta_renumbers:
            del fields[packet.index - 1]
        else:
            fields[packet.index - 1] = None
    return [field for field in fields if field is not None]


@pytest.mark.parametrize("order", list(permutations([1, 2, 4])), ids=str)
def test_deletions_mean_the_same_to_both_mtas(order: tuple[int, ...]) -> None:
    sent = packets(*(DeleteHeader("X", index) for index in order))
    assert deleted_by(True, sent, 4) == deleted_by(False, sent, 4) == [3]


AGREEMENT = Agreement(
    Negotiate(6, int(ALL_ACTIONS | Actions.SETSYMLIST), int(LEADSPC)), {}, frozenset()
)
ACTIONS = st.lists(st.sampled_from([action for action, _ in ONE_PACKET]), max_size=8).filter(
    lambda actions: sum(isinstance(action, ReplaceBody) for action in actions) < 2
)


@given(ACTIONS)
def test_whatever_an_author_says_is_a_legal_answer(actions: list[Action]) -> None:
    answer = to_replies(Accept(*actions), LEADSPC)
    assert check_replies(Stage.EOM, answer, AGREEMENT) == ord("a")


@pytest.mark.parametrize(
    ("seen", "index", "packet"),
    [
        (["x", "X"], 2, replies.ChangeHeader(2, "X", "v")),
        (["x", "X"], 3, replies.InsertHeader(LAST, "X", "v")),
        ([], 1, replies.InsertHeader(LAST, "X", "v")),
        (None, 1, replies.ChangeHeader(1, "X", "v")),
    ],
    ids=str,
)
def test_a_change_of_a_field_that_is_not_there_is_an_addition(
    seen: list[str] | None, index: int, packet: Packet
) -> None:
    sent = list(action_packets([ChangeHeader("X", index, "v")], NO_PROTOCOL, seen))
    assert sent == [packet]


def test_other_actions_do_not_care_what_was_seen() -> None:
    assert list(action_packets([DeleteHeader("X")], NO_PROTOCOL, [])) == packets(DeleteHeader("X"))
