"""Hypothesis strategies for the protocol's values, and short ways to say what tests say often."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise

from hypothesis import strategies as st

from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.commands import Negotiate
from sharded_milter.protocol.negotiation import Agreement, Handling, Manifest, negotiate
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.session import Session, State
from sharded_milter.protocol.stages import Actions, Protocol, Stage
from sharded_milter.protocol.text import to_text

ALL_ACTIONS = 0x1FF
ALL_PROTOCOL = 0x1FFFFF
OFFER = Negotiate(6, ALL_ACTIONS, ALL_PROTOCOL)

# Values

words = st.integers(0, 0xFFFFFFFF)
# Any text that the wire can bring: no NUL, and surrogates only as escaped bytes.
raw_strings = st.binary(max_size=40).map(lambda raw: raw.replace(b"\0", b""))
texts = st.one_of(st.text("aZ09.<>@é€😀%- \t\r\n", max_size=40), raw_strings.map(to_text))
text_tuples = st.lists(texts, max_size=4).map(tuple)
chunks = st.binary(max_size=200)
letters = st.binary(min_size=1, max_size=1)

commands_ = st.one_of(
    st.builds(
        Negotiate,
        words,
        words,
        words,
        st.lists(st.tuples(words, texts), max_size=3).map(tuple),
    ),
    st.builds(
        commands.Macro,
        letters.map(to_text),
        st.lists(st.tuples(texts, texts), max_size=3).map(tuple),
    ),
    st.builds(
        commands.Connect, texts, st.sampled_from(["4", "6", "L"]), st.integers(0, 0xFFFF), texts
    ),
    st.builds(commands.Connect, texts, letters.filter(lambda raw: raw not in b"46L").map(to_text)),
    st.builds(commands.Helo, texts),
    st.builds(commands.Mail, texts, text_tuples),
    st.builds(commands.Rcpt, texts, text_tuples),
    st.builds(commands.Data),
    st.builds(commands.Header, texts, texts),
    st.builds(commands.Eoh),
    st.builds(commands.Body, chunks),
    st.builds(commands.Eom, chunks),
    st.builds(commands.Abort),
    st.builds(commands.Quit),
    st.builds(commands.QuitNc),
    st.builds(commands.Unknown, texts),
)

replies_ = st.one_of(
    st.builds(replies.Continue),
    st.builds(replies.Accept),
    st.builds(replies.Reject),
    st.builds(replies.TempFail),
    st.builds(replies.Discard),
    st.builds(replies.Skip),
    st.builds(replies.ReplyCode, texts),
    st.builds(replies.Progress),
    st.builds(replies.AddHeader, texts, texts),
    st.builds(replies.InsertHeader, words, texts, texts),
    st.builds(replies.ChangeHeader, words, texts, texts),
    st.builds(replies.ReplaceBody, chunks),
    st.builds(replies.AddRecipient, texts),
    st.builds(replies.AddRecipientPar, texts, text_tuples),
    st.builds(replies.DeleteRecipient, texts),
    st.builds(replies.ChangeSender, texts, text_tuples),
    st.builds(replies.Quarantine, texts),
)

# Payloads that are nearly right find more than arbitrary ones do.
payloads = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from([b"\0", b"a", b"4", b"U", b"\0\0\0\6", b"name\0", b"\xff"])).map(
        b"".join
    ),
)

offers = st.builds(Negotiate, st.integers(2, 9), words, words)
macro_names = st.sampled_from(
    [
        "i",
        "{i}",
        "j",
        "{auth_authen}",
        "{client_ptr}",
        "{msg_id}",
        *(f"{{m{n}}}" for n in range(60)),
    ]
)
symlist_stages = st.sampled_from([stage for stage in Stage if stage.symlist is not None])
manifests = st.builds(
    Manifest,
    st.just("milter"),
    st.integers(0, ALL_ACTIONS).map(Actions),
    st.integers(0, ALL_PROTOCOL).map(Protocol) | words.map(Protocol),
    st.lists(
        st.tuples(symlist_stages, st.lists(macro_names, max_size=60).map(tuple)), max_size=3
    ).map(tuple),
    st.frozensets(st.sampled_from(Stage)),
    st.sampled_from(["", "sender"]),
)

# Conversations

# One well-formed packet for each letter a peer can send; letters that are no command's included.
PACKETS: dict[str, bytes] = {
    chr(command.letter[0]): command.encode()
    for command in (
        OFFER,
        commands.Connect("client.example.test", "4", 25, "192.0.2.1"),
        commands.Helo("client.example.test"),
        commands.Mail("<a@example.org>"),
        commands.Rcpt("<b@example.com>"),
        commands.Data(),
        commands.Header("Subject", "hi"),
        commands.Eoh(),
        commands.Body(b"text\r\n"),
        commands.Eom(),
        commands.Abort(),
        commands.Quit(),
        commands.QuitNc(),
        commands.Unknown("XYZZY"),
    )
}


def macro(stage: str) -> bytes:
    """A macro packet for the command of that letter."""
    return commands.Macro(stage, (("i", "4Zx"),)).encode()


def packet(letter: str, payload: bytes = b"") -> bytes:
    """A packet by hand, independent of the package's own framing."""
    return struct.pack(">I", 1 + len(payload)) + letter.encode("latin-1") + payload


def encoded(parts: Iterable[Packet]) -> bytes:
    return b"".join(part.encode() for part in parts)


def agreement(protocol: int = 0, actions: int = ALL_ACTIONS) -> Agreement:
    """What is agreed with an MTA that offers all, when one milter wants this."""
    return negotiate(OFFER, [Manifest("milter", Actions(actions), Protocol(protocol))])


def session_in(state: State, agreed: Agreement | None = None) -> Session:
    """A session that has just come to a state."""
    session = Session(state)
    if state is not State.START:
        session.agree(agreed or agreement())
    return session


def obeyed(reply: Negotiate) -> Agreement:
    """The agreement of a milter that answered a negotiation with this and asks about the rest."""
    protocol = Protocol(reply.protocol)
    handling = {
        stage.code: Handling.NO_REPLY if protocol & stage.no_reply else Handling.ASK
        for stage in Stage
    }
    seen = frozenset(stage.code for stage in Stage if not protocol & stage.suppress)
    return Agreement(reply, handling, seen)


def sliced(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The data cut at these places."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]
