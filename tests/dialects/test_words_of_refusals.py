"""smfi_setreply and smfi_setmlreply: the reply text, and refused arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharded_milter.dialects.libmilter.reply import MAX_LINE, reply_lines
from sharded_milter.errors import CallRefused
from sharded_milter.protocol.answers import check_replies
from sharded_milter.protocol.commands import Negotiate
from sharded_milter.protocol.negotiation import Agreement
from sharded_milter.protocol.replies import ReplyCode
from sharded_milter.protocol.stages import Stage

AGREEMENT = Agreement(Negotiate(6, 0, 0), {}, frozenset())


def words(rcode: Any, xcode: Any, *lines: Any) -> str:
    return reply_lines("smfi_x", rcode, xcode, lines)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("550", "5.7.1", "no"), "550 5.7.1 no"),
        (("451", "4.3.2", "later"), "451 4.3.2 later"),
        (("421", None, "bye"), "421 bye"),
        (("550", None, None), "550 "),
        (("550", "", ""), "550 "),
        (("550", "5.7.1", None), "550 5.7.1"),
        (("599", "5.999.999", "x"), "599 5.999.999 x"),
        (("550", "5.7.1", "one", "two"), "550-5.7.1 one\r\n550 5.7.1 two"),
        (("550", None, "one", "two"), "550-5.0.0 one\r\n550 5.0.0 two"),
        (("450", None, "one", "", None), "450-4.0.0 one\r\n450-4.0.0 \r\n450 4.0.0"),
        (("550", None, "all 100 % of %s"), "550 all 100 %% of %%s"),
        (("550", None, "all 100 %% of %%%"), "550 all 100 %% of %%%%"),
        (("550", None, "caf\udce9"), "550 caf\udce9"),
        (("550", None, "2 errors"), "550 5.0.0 2 errors"),
        (("450", None, "5 errors"), "450 4.0.0 5 errors"),
        (("550", None, "5.1.1 no such user"), "550 5.1.1 no such user"),
    ],
    ids=ascii,
)  # fmt: skip
def test_a_refusal_in_the_authors_words(arguments: Sequence[Any], text: str) -> None:
    assert words(*arguments) == text


CODE = "is neither 4dd nor 5dd"
XCODE = "is neither 4.d.d nor 5.d.d"
NO_CODES = ["250", "350", "45", "4500", "45x", "", " 450", "450\n", "4\u0665\u0661", None, 550]
NO_XCODES = ["5", "5.7", "2.0.0", "5.7.1.1", "5.7.1234", "5..1", "5.7.1 ", "5.\u0667.1", 5.7]
REFUSED: list[tuple[tuple[Any, ...], str]] = [
    *(((code, None, "x"), f"smfi_x: reply code {code!r} {CODE}") for code in NO_CODES),
    *((("550", code, "x"), f"smfi_x: enhanced code {code!r} {XCODE}") for code in NO_XCODES),
    (("550", "4.7.1", "x"), "smfi_x: enhanced code 4.7.1 does not belong to reply code 550"),
    (("450", "5.7.1", "x"), "smfi_x: enhanced code 5.7.1 does not belong to reply code 450"),
    (("550", None), "smfi_x: a reply has 1 to 32 lines, not 0"),
    (("550", None, *["x"] * 33), "smfi_x: a reply has 1 to 32 lines, not 33"),
    (("550", None, b"x"), "smfi_x: b'x' is not a str"),
    (("550", None, 5), "smfi_x: 5 is not a str"),
    (("550", None, "a\nb"), r"smfi_x: 'a\nb' has a line break or a NUL"),
    (("550", None, "a\rb"), r"smfi_x: 'a\rb' has a line break or a NUL"),
    (("550", None, "a\0b"), r"smfi_x: 'a\x00b' has a line break or a NUL"),
    (("550", None, "ok", "a\n"), r"smfi_x: 'a\n' has a line break or a NUL"),
    (("550", None, "\ud800"), r"smfi_x: '\ud800' cannot be encoded as UTF-8"),
    (("550", None, "x" * 981), "smfi_x: a line of 981 bytes exceeds the limit of 980"),
    (("550", None, "é" * 491), "smfi_x: a line of 982 bytes exceeds the limit of 980"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "text"), REFUSED, ids=lambda value: ascii(value)[:60])
def test_what_libmilter_or_an_mta_would_not_take_is_refused(
    arguments: Sequence[Any], text: str
) -> None:
    with pytest.raises(CallRefused) as refused:
        words(*arguments)
    assert str(refused.value).startswith(text)


def test_the_limits_are_libmilters() -> None:
    assert MAX_LINE == 980
    assert words("550", None, *["x" * 980] * 32).count("\r\n") == 31


line = st.one_of(st.none(), st.text(max_size=6), st.sampled_from(["%", "5 x", "4", "é" * 490]))


@given(
    st.sampled_from(["450", "421", "550", "250"]),
    st.sampled_from([None, "", "4.7.1", "5.7.1", "5.999.999"]),
    st.lists(line, min_size=1, max_size=33),
)
@example("550", "5.999.999", ["%" * 980] * 32)
@example("550", "5.7.1", ["x" * 980])
def test_whatever_is_not_refused_is_a_legal_answer(
    rcode: str, xcode: str | None, lines: list[str | None]
) -> None:
    text = refusal = ""
    try:
        text = words(rcode, xcode, *lines)
    except CallRefused as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("smfi_x: ")
        return
    packet = ReplyCode(text).encode()
    for stage in Stage:
        assert check_replies(stage, packet, AGREEMENT) == ord("y")
    said = [said.partition(rcode)[2][1:] for said in text.split("\r\n")]
    assert len(said) == len(lines)
    for got, meant in zip(said, lines, strict=True):
        assert got.replace("%%", "").endswith((meant or "").replace("%", ""))
