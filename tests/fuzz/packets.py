"""What strange MTAs may say and strange milters may answer, as Hypothesis strategies of bytes."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

from .mta import packet, strings

# Values. NULs come in by mutation.

texts = st.one_of(
    st.sampled_from([b"", b"<>", b"<a@example.org>", b"\xff\xfe", b"a\n\tb", b"%s%%", b"x" * 600]),
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\0", b".")),
)
bodies = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"line\r\n" * 60, b"y" * 1500]))
words = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 6, 7, 0x3F, 0x1FF, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF)
)

# Commands

offers = st.one_of(
    st.just(struct.pack("!III", 6, 0x1FF, 0x1FFFFF)),
    st.tuples(words, words, words).map(lambda three: struct.pack("!III", *three)),
)
connects = st.one_of(
    st.builds(
        lambda name, family, address: strings(name) + family + b"\0\x19" + strings(address),
        texts,
        st.sampled_from([b"4", b"6", b"L"]),
        texts,
    ),
    texts.map(lambda name: strings(name) + b"U"),
)
envelope = st.lists(texts, min_size=1, max_size=3).map(lambda texts: strings(*texts))
macro_pairs = st.lists(texts, max_size=4).map(lambda texts: strings(*texts[: len(texts) & ~1]))
POSTFIX = b"C" + strings(b"v", b"Postfix 3.9.0")
macros = st.sampled_from("CCHMRTNELBUx").flatmap(
    lambda stage: st.one_of(
        macro_pairs.map(lambda pairs: stage.encode() + pairs),
        st.just(POSTFIX if stage == "C" else stage.encode()),
    )
)

_PAYLOADS = {
    "O": offers,
    "D": macros,
    "C": connects,
    "H": texts.map(strings),
    "M": envelope,
    "R": envelope,
    "T": st.just(b""),
    "L": st.tuples(texts, texts).map(lambda two: strings(*two)),
    "N": st.just(b""),
    "B": bodies,
    "E": st.one_of(st.just(b""), bodies),
    "U": texts.map(strings),
    "A": st.just(b""),
    "Q": st.just(b""),
    "K": st.just(b""),
}


def command(letter: str) -> st.SearchStrategy[bytes]:
    return _PAYLOADS[letter].map(lambda payload: packet(letter, payload))


#: Well-formed commands that continue a conversation, in no order.
commands = st.sampled_from("DCHMRTLNBEUAK").flatmap(command)


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Commands in the order in which an MTA has them, some of them left out."""
    order = draw(
        st.sampled_from(["DCDHDMDRRTLLNBE", "MRTLNBBEA", "DMDRDTDLDNDBDEAA", "HMRRRAMRTE"])
    )
    left_out = draw(st.sets(st.integers(0, len(order) - 1), max_size=2))
    chosen = [letter for number, letter in enumerate(order) if number not in left_out]
    return b"".join(draw(command(letter)) for letter in chosen)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A command in which some bytes were changed, lost or added."""
    data = bytearray(draw(commands))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


#: Bytes of nobody: random ones, unknown letters, impossible lengths.
noise = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.tuples(st.characters(max_codepoint=255), bodies).map(lambda two: packet(*two)),
    st.sampled_from([b"\0\0\0\0", b"\0\0\0\0Q", b"\xff\xff\xff\xff", b"\0\x10\0\1B"]),
)

# Answers of a milter

_indexed = st.tuples(words, texts, texts).map(
    lambda three: struct.pack("!I", three[0]) + strings(three[1], three[2])
)
_REPLIES = {
    "h": st.tuples(texts, texts).map(lambda two: strings(*two)),
    "i": _indexed,
    "m": _indexed,
    "b": bodies,
    "+": texts.map(strings),
    "-": texts.map(strings),
    "2": envelope,
    "e": envelope,
    "q": texts.map(strings),
    "y": st.sampled_from([b"550 5.7.1 no\0", b"451-4.7.1 a\r\n451 4.7.1 b\0", b"250 ok\0", b"550"]),
}
intermediate = st.sampled_from("hibm+-2eqp").flatmap(
    lambda letter: _REPLIES.get(letter, st.just(b"")).map(lambda payload: packet(letter, payload))
)
final = st.sampled_from("ccccarrtdsyf4O").flatmap(
    lambda letter: _REPLIES.get(letter, st.just(b"")).map(lambda payload: packet(letter, payload))
)

#: Stands for a refusal that names the stage at which it is given.
SIGNED = b"?"


def signed(letter: str) -> bytes:
    return packet("y", b"550 5.7.1 at " + letter.encode() + b"\0")


#: Legal or not, whole or not.
answers = st.one_of(
    st.just(SIGNED),
    st.just(SIGNED),
    final,
    st.tuples(st.lists(intermediate, max_size=4), final).map(
        lambda two: b"".join([*two[0], two[1]])
    ),
    st.lists(intermediate, max_size=2).map(b"".join),
    st.tuples(final, final).map(b"".join),
    st.binary(max_size=20),
)
