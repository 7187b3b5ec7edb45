"""Macros by libmilter's rules, compared with a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.dialects.libmilter.symbols import Symbols
from sharded_milter.protocol.commands import Macro

# libmilter's numbers of the stages, in the order of a conversation: CI_CONN to CI_EOH. Only these
# four commands clear, and each clears the numbers above its own.
NUMBERS = {"C": 0, "H": 1, "M": 2, "R": 3, "T": 4, "N": 5, "E": 6}
CLEARING = "CHMR"
LETTERS = "CHMRTLNBEUA"
# Names that differ only in their braces are one name.
ONE_NAME = [("i", "{i}"), ("{msg_id}",), ("_", "{_}")]
NAMES = [name for names in ONE_NAME for name in names]

Event = tuple[str, str, dict[str, str]]
macros = st.tuples(
    st.just("macro"),
    st.sampled_from(LETTERS),
    st.lists(st.sampled_from(ONE_NAME), unique=True, max_size=3).flatmap(
        lambda names: st.fixed_dictionaries({name: st.text("xy", max_size=2) for *_, name in names})
    ),
)
nothing: dict[str, str] = {}
reached = st.tuples(st.just("reached"), st.sampled_from(LETTERS), st.just(nothing))
events = st.lists(st.one_of(macros, reached), max_size=12)


def modelled(history: list[Event], names: tuple[str, ...]) -> str | None:
    """Return the value that libmilter would find: the last in the history."""
    known: dict[int, dict[str, str]] = {}
    for kind, letter, values in history:
        number = NUMBERS.get(letter)
        if number is None:
            continue
        if kind == "macro":
            known[number] = values
        elif letter in CLEARING:
            known = {n: values for n, values in known.items() if n <= number}
    for number in sorted(known, reverse=True):
        for name in names:
            if name in known[number]:
                return known[number][name]
    return None


@given(events)
def test_macros_are_found_as_libmilter_finds_them(history: list[Event]) -> None:
    symbols = Symbols()
    for kind, letter, values in history:
        if kind == "macro":
            symbols.add(Macro(letter, tuple(values.items())).payload())
        else:
            symbols.forget_later(ord(letter))
    for names in ONE_NAME:
        for name in names:
            assert symbols.get(name) == modelled(history, names)


def symbols_of(*macros: Macro) -> Symbols:
    symbols = Symbols()
    for macro in macros:
        symbols.add(macro.payload())
    return symbols


@pytest.mark.parametrize("said", ["i", "{i}"])
@pytest.mark.parametrize("asked", ["i", "{i}"])
def test_one_letter_is_found_with_and_without_braces(said: str, asked: str) -> None:
    assert symbols_of(Macro("M", ((said, "4F1"),))).get(asked) == "4F1"


@pytest.mark.parametrize("asked", ["msg_id", "{msg_i}", "{}", "", "}{x", "{xy"])
def test_longer_names_have_one_spelling(asked: str) -> None:
    assert symbols_of(Macro("E", (("{msg_id}", "1"),))).get(asked) is None


def test_an_empty_value_is_a_value() -> None:
    symbols = symbols_of(Macro("C", (("{mail_addr}", "old"),)), Macro("M", (("{mail_addr}", ""),)))
    assert symbols.get("{mail_addr}") == ""


def test_end_of_message_hides_end_of_headers() -> None:
    both = Macro("E", (("i", "end"),)), Macro("N", (("i", "header"),))
    assert symbols_of(*both).get("i") == "end"


def test_any_byte_survives() -> None:
    symbols = Symbols()
    symbols.add(b"Mi\0caf\xe9\0")
    assert symbols.get("i") == "caf\udce9"


def test_an_unknown_macro_is_none() -> None:
    assert Symbols().get("i") is None
