"""Constructors refuse every value that cannot be sent, and name it."""

from __future__ import annotations

import re
from collections.abc import Callable
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
    InvalidValue,
    Quarantine,
    Reject,
    ReplaceBody,
    TempFail,
)
from sharded_milter.api.verdicts import MAX_TEXT, Action
from sharded_milter.dialects.functions.replies import action_packets
from sharded_milter.protocol.stages import Protocol
from sharded_milter.protocol.wire import MAX_CHUNK, PAYLOAD

LONG = "x" * (MAX_TEXT + 1)

WITH_HEADER: dict[str, Callable[[str, str], object]] = {
    "AddHeader": AddHeader,
    "InsertHeader": lambda name, value: InsertHeader(0, name, value),
    "ChangeHeader": lambda name, value: ChangeHeader(name, 1, value),
}
BAD_NAMES = ["", "X Y", "X:", "X\n", "\x7f", "Ü", "x" * 999]
BAD_VALUES = ["a\0b", "a\nb", "a\r\nb", "a\rb", "a\n", "a\n\n b", "\ud800", LONG]


@pytest.mark.parametrize("build", WITH_HEADER.values(), ids=WITH_HEADER)
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_header_name_is_visible_ascii(build: Callable[[str, str], object], name: str) -> None:
    with pytest.raises(InvalidValue, match="header name"):
        build(name, "v")


@pytest.mark.parametrize("build", WITH_HEADER.values(), ids=WITH_HEADER)
@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: ascii(value[:8]))
def test_a_header_value_breaks_lines_only_by_folding(
    build: Callable[[str, str], object], value: str
) -> None:
    with pytest.raises(InvalidValue, match="header X"):
        build("X", value)


@pytest.mark.parametrize("build", WITH_HEADER.values(), ids=WITH_HEADER)
@pytest.mark.parametrize("value", ["a", "a\n\tb", "a\r\n b", "caf\udce9", "ü", "a: b"])
def test_a_header_value_may_be_folded_and_hold_any_byte(
    build: Callable[[str, str], object], value: str
) -> None:
    assert build("X", value) == build("X", value)


@pytest.mark.parametrize("name", ["Received", "X-1", "!~"])
def test_a_header_is_deleted_by_name(name: str) -> None:
    assert DeleteHeader(name) == DeleteHeader(name, 1)


def test_a_header_to_delete_needs_a_name_that_exists() -> None:
    with pytest.raises(InvalidValue, match="header name"):
        DeleteHeader("X Y")


def test_an_empty_value_is_for_adding_only() -> None:
    assert AddHeader("X", "") == AddHeader("X", "")
    with pytest.raises(InvalidValue, match="use DeleteHeader"):
        ChangeHeader("X", 1, "")


@pytest.mark.parametrize("index", [-1, 2**31, "1", None, 1.0])
def test_a_header_index_is_a_number_that_both_mtas_understand(index: Any) -> None:
    for build in (
        lambda: InsertHeader(index, "X", "v"),
        lambda: ChangeHeader("X", index, "v"),
        lambda: DeleteHeader("X", index),
    ):
        with pytest.raises(InvalidValue, match=f"header index {re.escape(repr(index))}"):
            build()


def test_only_insertion_counts_from_zero() -> None:
    assert InsertHeader(0, "X", "v").index == 0
    with pytest.raises(InvalidValue, match="between 1 and"):
        ChangeHeader("X", 0, "v")
    with pytest.raises(InvalidValue, match="between 1 and"):
        DeleteHeader("X", 0)


@pytest.mark.parametrize("build", [AddRecipient, DeleteRecipient, ChangeSender])
@pytest.mark.parametrize("address", ["a\0", "a\r", "a\n", "\ud800", LONG, None, b"a@b"])
def test_an_address_is_one_line_of_text(build: Any, address: Any) -> None:
    with pytest.raises(InvalidValue, match=r"recipient|sender"):
        build(address)


@pytest.mark.parametrize("build", [AddRecipient, DeleteRecipient])
def test_a_recipient_is_not_empty_but_a_sender_may_be(build: Any) -> None:
    assert ChangeSender("").address == ""
    with pytest.raises(InvalidValue, match="is empty"):
        build("")


@pytest.mark.parametrize("build", [AddRecipient, ChangeSender])
@pytest.mark.parametrize("parameter", ["A B", "A\tB", "A\0", "A\r", "A\n", "", 1])
def test_an_esmtp_parameter_is_one_word(build: Any, parameter: Any) -> None:
    assert build("a@b", ("NOTIFY=NEVER", "ORCPT=rfc822;a@b"))
    with pytest.raises(InvalidValue, match="ESMTP parameter"):
        build("a@b", ("NOTIFY=NEVER", parameter))


@pytest.mark.parametrize("build", [AddRecipient, ChangeSender])
@pytest.mark.parametrize("esmtp", ["NOTIFY=NEVER", ["NOTIFY=NEVER"], None])
def test_esmtp_parameters_are_a_tuple_and_not_a_text(build: Any, esmtp: Any) -> None:
    with pytest.raises(InvalidValue, match="must be a tuple"):
        build("a@b", esmtp)


def test_address_and_parameters_must_fit_into_one_packet_together() -> None:
    with pytest.raises(InvalidValue, match="with its ESMTP parameters"):
        AddRecipient("a" * (MAX_TEXT // 2), ("b" * (MAX_TEXT // 2),))


@pytest.mark.parametrize("body", ["text", None, bytearray(b"x")])
def test_a_body_is_bytes(body: Any) -> None:
    with pytest.raises(InvalidValue, match="body must be bytes"):
        ReplaceBody(body)


@pytest.mark.parametrize("reason", ["", "a\nb", "a\rb", "a\0", None])
def test_a_quarantine_reason_is_one_line(reason: Any) -> None:
    with pytest.raises(InvalidValue, match="quarantine reason"):
        Quarantine(reason)


@pytest.mark.parametrize(("refusal", "digit"), [(Reject, 5), (TempFail, 4)])
def test_a_refusal_has_codes_of_its_class_only(refusal: Any, digit: int) -> None:
    for code in range(100, 700):
        if code // 100 == digit:
            assert refusal("no", code).code == code
        else:
            with pytest.raises(InvalidValue, match=f"reply code {code}"):
                refusal("no", code)


@pytest.mark.parametrize(("refusal", "digit"), [(Reject, 5), (TempFail, 4)])
@pytest.mark.parametrize(
    "xcode",
    ["{}", "{}.1", "{}.1.1.1", "{}.1.1234", "{}.a.1", "{}.٣.1", "x.1.1", "", "2.1.1", "{}.1.1\n"],
)
def test_an_enhanced_code_has_three_parts_of_its_class(
    refusal: Any, digit: int, xcode: str
) -> None:
    assert refusal("no", xcode=f"{digit}.999.0").xcode == f"{digit}.999.0"
    with pytest.raises(InvalidValue, match="enhanced code"):
        refusal("no", xcode=xcode.format(digit))


@pytest.mark.parametrize("refusal", [Reject, TempFail])
def test_a_refusal_of_the_other_class_is_none(refusal: Any) -> None:
    other = {Reject: "4.7.1", TempFail: "5.7.1"}[refusal]
    with pytest.raises(InvalidValue, match="enhanced code"):
        refusal("no", xcode=other)


@pytest.mark.parametrize("refusal", [Reject, TempFail])
@pytest.mark.parametrize("wrong", [{"text": None}, {"text": b"no"}, {"text": "\0"}, {"text": LONG},
                                   {"code": "550"}, {"xcode": None}])  # fmt: skip
def test_a_refusal_of_wrong_type_is_named(refusal: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        refusal(**{"text": "no", **wrong})


def test_a_refusal_may_have_several_lines() -> None:
    assert Reject("one\ntwo\r\nthree").text == "one\ntwo\r\nthree"


@pytest.mark.parametrize("wrong", [None, "X: y", Reject("no"), Discard()])
def test_accept_takes_actions_only(wrong: Any) -> None:
    with pytest.raises(InvalidValue, match="Accept takes actions"):
        Accept(AddHeader("X", "v"), wrong)


def test_accept_takes_one_body_only() -> None:
    with pytest.raises(InvalidValue, match="one ReplaceBody"):
        Accept(ReplaceBody(b"a"), Quarantine("odd"), ReplaceBody(b"b"))


def test_verdicts_compare_by_value() -> None:
    assert Accept(AddHeader("X", "v")) == Accept(AddHeader("X", "v"))
    assert Accept() != Accept(AddHeader("X", "v"))
    assert hash(Accept(Quarantine("a"))) == hash(Accept(Quarantine("a")))
    assert Reject("no") == Reject("no", 550, "5.7.1")
    assert TempFail("later") == TempFail("later", 451, "4.7.1")
    assert Discard() == Discard()


HUGE = st.sampled_from(["x" * 998, "X"])
TEXT = st.sampled_from(["v" * MAX_TEXT, "ü" * (MAX_TEXT // 2), "v"])


@given(
    st.one_of(
        st.builds(AddHeader, HUGE, TEXT),
        st.builds(ChangeHeader, HUGE, st.just(2**31 - 1), TEXT),
        st.builds(AddRecipient, TEXT),
        st.builds(
            AddRecipient, st.just("a"), TEXT.filter(lambda t: len(t) < 2).map(lambda t: (t,))
        ),
        st.builds(ChangeSender, TEXT),
        st.builds(Quarantine, TEXT),
    )
)
def test_what_a_constructor_takes_fits_into_one_packet(action: Action) -> None:
    for packet in action_packets([action], Protocol.HDR_LEADSPC):
        assert len(packet.encode()) - PAYLOAD <= MAX_CHUNK
