"""Whole conversations with an object: its callbacks, their order, and the ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watched import CALLBACKS, EVERY_CALLBACK, PACKETS, Watched, agreed, packed

from sharded_milter.dialects.libmilter.classes import Milter
from sharded_milter.dialects.libmilter.context import ReturnCodes
from sharded_milter.dialects.loader import as_dialect
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Protocol, Stage
from sharded_milter.protocol.wire import frame

CODES = ReturnCodes
FINAL = {CODES.REJECT: b"r", CODES.DISCARD: b"d", CODES.ACCEPT: b"a", CODES.TEMPFAIL: b"t"}
HELD = {Stage.RCPT, Stage.DATA}  # a refusal is of this one command
NAME_OF = {type(packet): CALLBACKS[stage] for stage, packet in PACKETS.items()}
STAGE_OF = {type(packet): stage for stage, packet in PACKETS.items()}


def several(packet: Packet, most: int = 2) -> st.SearchStrategy[list[Packet]]:
    return st.lists(st.just(packet), max_size=most)


def joined(parts: tuple[list[Packet], ...]) -> list[Packet]:
    return [packet for part in parts for packet in part]


LOCAL = commands.Macro("R", (("{rcpt_mailer}", "local"),))
REFUSED_BY_MTA = commands.Macro("R", (("{rcpt_mailer}", "error"),))
RCPT = PACKETS[Stage.RCPT]
RECIPIENTS: list[list[Packet]] = [
    [LOCAL, RCPT],
    [RCPT],
    [LOCAL, RCPT, replies.Reject()],
    [REFUSED_BY_MTA, RCPT, replies.Reject()],
    [REFUSED_BY_MTA],
    [PACKETS[Stage.UNKNOWN]],
]
recipients = st.lists(st.sampled_from(RECIPIENTS), max_size=3).map(
    lambda lists: joined(tuple(lists))
)
ends = st.sampled_from(
    [
        [commands.Eom()],
        [commands.Eom(b"the last")],
        [commands.Eom(b"the last"), commands.Abort()],
        [commands.Abort()],
        [commands.Abort(), commands.Abort(), PACKETS[Stage.HELO]],
        [],  # the next begins, or the connection ends, without a word
    ]
)
messages = st.tuples(
    st.sampled_from([[commands.Macro("M", (("i", "4F1"),)), PACKETS[Stage.MAIL]],
                     [PACKETS[Stage.MAIL]], []]),
    recipients,
    several(PACKETS[Stage.DATA]),
    several(PACKETS[Stage.HEADER]),
    several(PACKETS[Stage.EOH], 1),
    several(PACKETS[Stage.BODY], 3),
    ends,
).map(joined)  # fmt: skip
conversations = st.tuples(
    st.sampled_from([[], [PACKETS[Stage.CONNECT]]]),
    several(PACKETS[Stage.HELO]),
    st.lists(messages, max_size=3).map(lambda lists: joined(tuple(lists))),
).map(joined)
GIVEN = {
    name: [CODES.CONTINUE] * 6
    + {
        "xxfi_connect": [CODES.REJECT],
        "xxfi_helo": [CODES.ACCEPT],
        "xxfi_unknown": [CODES.TEMPFAIL],
        "xxfi_body": [*FINAL, CODES.SKIP, CODES.SKIP],
        "xxfi_abort": [],
        "xxfi_close": [],
    }.get(name, list(FINAL))
    for name in EVERY_CALLBACK
}
scripts = st.fixed_dictionaries(
    {name: st.lists(st.sampled_from(GIVEN[name]), min_size=1, max_size=4) for name in GIVEN}
)
Script = dict[str, list[ReturnCodes]]


def follows(script: Script, **options: Any) -> Watched:
    """A milter whose callbacks return the codes of a script, which is repeated."""
    counts = dict.fromkeys(script, 0)

    def answer_of(name: str) -> Any:
        def answer(milter: Any) -> ReturnCodes:
            counts[name] += 1
            codes = script[name]
            return codes[(counts[name] - 1) % len(codes)]

        return answer

    return Watched({name: answer_of(name) for name in script}, **options)


def modelled(packets: list[Packet], script: Script, rejected: bool) -> tuple[list[str], bytes]:
    """The callbacks that libmilter's documentation promises, and the last answer.

    `rejected` says that recipients that the MTA refuses are wanted.
    """
    calls: list[str] = []
    last, verdict = b"c", b""
    is_open = skips = refused = False

    def called(name: str) -> ReturnCodes:
        codes = script[name]
        calls.append(name)
        return codes[(calls.count(name) - 1) % len(codes)]

    for packet in packets:
        match packet:
            case commands.Macro(stage="R", pairs=((_, mailer),)):
                refused = mailer == "error"
                continue
            case commands.Macro() | replies.Reject():
                continue
            case commands.Connect() | commands.Helo():
                # A greeting makes the macros of messages void; those of recipients are in hand.
                refused = False
        if isinstance(packet, commands.Abort | commands.Mail):
            if is_open:
                calls.append("xxfi_abort")
            is_open, verdict, skips = False, b"", False
        if isinstance(packet, commands.Mail):
            refused = False
        if isinstance(packet, commands.Abort):
            continue
        stage = STAGE_OF[type(packet)]
        if stage in (Stage.CONNECT, Stage.HELO, Stage.UNKNOWN):
            last = FINAL.get(called(CALLBACKS[stage]), b"c")
            continue
        if not is_open and not verdict:
            is_open, skips = True, False
        pieces: list[Stage] = [stage]
        if isinstance(packet, commands.Eom) and packet.chunk:
            pieces = [Stage.BODY, Stage.EOM]
        for piece in pieces:
            if verdict:
                last = verdict
            elif (piece is Stage.BODY and skips) or (
                piece is Stage.RCPT and refused and not rejected
            ):
                last = b"c"
            else:
                code = called(CALLBACKS[piece])
                skips = skips or code is CODES.SKIP
                last = FINAL.get(code, b"c")
                if piece is Stage.EOM:
                    is_open = False
                elif last != b"c" and not (piece in HELD and last in (b"r", b"t")):
                    verdict, is_open = last, False
        if stage is Stage.EOM:
            is_open, verdict, skips = False, b"", False
    if is_open:
        calls.append("xxfi_abort")
    return [*calls, "xxfi_close"], last


@given(conversations, scripts, st.booleans())
@settings(max_examples=300)
def test_an_object_gets_the_callbacks_that_libmilter_promises(
    packets: list[Packet], script: Script, rejected: bool
) -> None:
    wanted = (0, Protocol.RCPT_REJ if rejected else Protocol(0))
    watched = follows(script, xxfi_negotiate=lambda *_: wanted)
    last = watched.ask(*packets)
    assert watched.close() == b""
    calls, letter = modelled(packets, script, rejected)
    assert watched.names == calls
    assert last == frame(letter)


@given(conversations, scripts)
@settings(max_examples=200)
def test_a_message_ends_once_and_the_connection_last(packets: list[Packet], script: Script) -> None:
    watched = follows(script, xxfi_negotiate=lambda *_: (0, Protocol.RCPT_REJ))
    watched.ask(*packets)
    watched.close()
    counts = dict.fromkeys(script, 0)
    is_open = False
    for name in watched.names:
        code = script[name][counts[name] % len(script[name])]
        counts[name] += 1
        if name in ("xxfi_abort", "xxfi_eom"):
            assert is_open or name == "xxfi_eom"
            is_open = False
        elif name not in ("xxfi_connect", "xxfi_helo", "xxfi_unknown", "xxfi_close"):
            assert not (is_open and name == "xxfi_envfrom")
            refusal = code in (CODES.REJECT, CODES.TEMPFAIL)
            held = name in ("xxfi_envrcpt", "xxfi_data") and refusal
            is_open = held or code not in FINAL
        else:
            assert name != "xxfi_close" or not is_open
    assert watched.names.count("xxfi_close") == 1
    assert watched.names[-1] == "xxfi_close"


@given(conversations, scripts, st.data())
def test_a_conversation_cut_into_jobs_is_the_same_conversation(
    packets: list[Packet], script: Script, data: st.DataObject
) -> None:
    packets = [*agreed(), *packets]
    whole, pieces = follows(script), follows(script)
    wanted = whole.ask(*packets)
    whole.close()
    got, rest = frame(b"c"), packets
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        # What is new of the connection comes first, what is new of the message behind it.
        client = data.draw(st.integers(0, size))
        got_now = pieces.dialect.answer(
            Stage.EOM, packed(rest[:client]), memoryview(packed(rest[client:size])), 7
        )
        assert isinstance(got_now, bytes)
        if any(type(packet) in NAME_OF for packet in rest[:size]):
            got = got_now
        rest = rest[size:]
    pieces.close(7)
    assert pieces.calls == whole.calls
    assert got == wanted


@given(conversations, scripts)
def test_coroutines_are_called_in_the_same_order_and_never_two_at_once(
    packets: list[Packet], script: Script
) -> None:
    plain, waiting = follows(script), follows(script, coroutines=True)
    assert waiting.ask(*packets) == plain.ask(*packets)
    plain.close()
    waiting.close()
    assert waiting.calls[::2] == plain.calls
    assert [name for name, *_ in waiting.calls[1::2]] == plain.names
    assert all(call[1:] == ("goes on",) for call in waiting.calls[1::2])


FIRST = [*agreed(), PACKETS[Stage.CONNECT], PACKETS[Stage.HELO]]
CONTENT = [PACKETS[each] for each in (Stage.DATA, Stage.HEADER, Stage.EOH, Stage.BODY)]


@given(messages.filter(bool))
def test_an_object_that_is_rebuilt_from_the_transcript_sees_what_the_first_one_saw(
    message: list[Packet],
) -> None:
    watched = Watched(replayable=True)
    for at, packet in enumerate([*FIRST, *message], 1):
        before = [*FIRST, *message][:at]
        watched.ask(packet, session=1)
        seen = list(watched.calls)
        watched.calls.clear()
        watched.ask(*before, session=1 + at)
        assert watched.calls == seen
        watched.calls[:] = seen


def test_each_connection_has_its_object() -> None:
    built: list[Any] = []

    def keep(milter: Any) -> ReturnCodes:
        built.append(milter)
        return CODES.CONTINUE

    watched = Watched({"xxfi_helo": keep})
    for session in (1, 2, 1):
        watched.ask(PACKETS[Stage.HELO], session=session)
    watched.close(1)
    watched.ask(PACKETS[Stage.HELO], session=1)
    assert built[0] is built[2]
    assert len(set(map(id, built))) == 3
    assert watched.names == ["xxfi_helo"] * 3 + ["xxfi_close", "xxfi_helo"]


def test_arguments_are_what_libmilter_gives() -> None:
    watched = Watched()
    watched.ask(*FIRST, PACKETS[Stage.UNKNOWN], PACKETS[Stage.MAIL], RCPT, *CONTENT)
    watched.ask(commands.Eom(b"two"))
    watched.ask(PACKETS[Stage.MAIL])
    watched.close()
    inet = watched.milter.NetworkTypes.INET
    assert watched.calls == [
        ("xxfi_connect", "client.example", inet, ("192.0.2.1", 25)),
        ("xxfi_helo", "client"),
        ("xxfi_unknown", "XYZZY 1"),
        ("xxfi_envfrom", ("<a@example.org>", "SIZE=9")),
        ("xxfi_envrcpt", ("<b@example.net>", "NOTIFY=NEVER")),
        ("xxfi_data",),
        ("xxfi_header", "Subject", "hi"),
        ("xxfi_eoh",),
        ("xxfi_body", b"one\r\n"),
        ("xxfi_body", b"two"),
        ("xxfi_eom",),
        ("xxfi_envfrom", ("<a@example.org>", "SIZE=9")),
        ("xxfi_abort",),
        ("xxfi_close",),
    ]


@pytest.mark.parametrize(
    ("connect", "arguments"),
    [
        (("h", "4", 25, "192.0.2.1"), ("h", "INET", ("192.0.2.1", 25))),
        (("h", "6", 25, "IPv6:2001:db8::1"), ("h", "INET6", ("2001:db8::1", 25))),
        (("h", "L", 0, "/run/s"), ("h", "UNIX", "/run/s")),
        (("h", "U"), ("h", "UNKNOWN", None)),
        (("h", "4", 0, "unknown"), ("h", "UNKNOWN", None)),
    ],
    ids=str,
)
def test_a_client_of_any_family(connect: Any, arguments: tuple[Any, ...]) -> None:
    watched = Watched()
    watched.ask(commands.Connect(*connect))
    [(_, hostname, family, address)] = watched.calls
    assert (hostname, family.name, address) == arguments


@pytest.mark.parametrize("asked_for", [False, True])
@pytest.mark.parametrize("granted", [False, True])
@pytest.mark.parametrize(
    ("sent", "bare"), [(" hi", "hi"), ("  hi", " hi"), ("hi", "hi"), ("\thi", "\thi"), ("", "")]
)
def test_the_blank_behind_the_colon_is_shown_to_those_who_asked(
    asked_for: bool, granted: bool, sent: str, bare: str
) -> None:
    bit = Protocol.HDR_LEADSPC
    watched = Watched(xxfi_negotiate=lambda *_: (0, bit if asked_for else 0))
    watched.ask(*agreed(0, bit if granted else Protocol(0)), commands.Header("X", sent))
    shown = sent if asked_for or not granted else bare
    assert watched.calls == [("xxfi_header", "X", shown)]


@pytest.mark.parametrize("asked_for", [False, True])
@pytest.mark.parametrize("granted", [False, True])
def test_the_blank_behind_the_colon_is_sent_for_those_who_did_not_ask(
    asked_for: bool, granted: bool
) -> None:
    def add(milter: Any) -> ReturnCodes:
        milter.smfi_addheader("X", "v")
        return CODES.CONTINUE

    bit = Protocol.HDR_LEADSPC
    watched = Watched({"xxfi_eom": add}, xxfi_negotiate=lambda *_: (1, bit if asked_for else 0))
    answer = watched.ask(*agreed(1, bit if granted else Protocol(0)), commands.Eom())
    blank = b" " if granted and not asked_for else b""
    assert answer == frame(b"h", b"X\0" + blank + b"v\0") + frame(b"c")


@pytest.mark.parametrize("asked_for", [False, True])
@pytest.mark.parametrize("mailer", ["error", "local", "errors", ""])
def test_a_recipient_that_the_mta_refuses_is_shown_to_those_who_asked(
    asked_for: bool, mailer: str
) -> None:
    watched = Watched(xxfi_negotiate=lambda *_: (0, Protocol.RCPT_REJ if asked_for else 0))
    answer = watched.ask(commands.Macro("R", (("{rcpt_mailer}", mailer),)), RCPT)
    assert answer == frame(b"c")
    assert watched.names == (["xxfi_envrcpt"] if asked_for or mailer != "error" else [])


MACROS = {letter: commands.Macro(letter, ((letter, letter),)) for letter in "CHMRTNE"}


def test_the_macros_that_each_callback_sees_are_those_of_its_stage_and_earlier_ones() -> None:
    seen: dict[str, str] = {}

    def look(name: str) -> Any:
        def answer(milter: Any) -> ReturnCodes:
            found = (letter for letter in MACROS if milter.smfi_getsymval(letter) == letter)
            seen[name] = "".join(found)
            return CODES.CONTINUE

        return answer

    watched = Watched({name: look(name) for name in EVERY_CALLBACK})
    order = {"C": Stage.CONNECT, "H": Stage.HELO, "M": Stage.MAIL, "R": Stage.RCPT,
             "T": Stage.DATA, "L": Stage.HEADER, "N": Stage.EOH, "B": Stage.BODY,
             "E": Stage.EOM}  # fmt: skip
    first = [
        packet
        for letter, stage in order.items()
        for packet in [*([MACROS[letter]] if letter in MACROS else []), PACKETS[stage]]
    ]
    watched.ask(*first)
    assert seen == {
        "xxfi_connect": "C",
        "xxfi_helo": "CH",
        "xxfi_envfrom": "CHM",
        "xxfi_envrcpt": "CHMR",
        "xxfi_data": "CHMRT",
        "xxfi_header": "CHMRT",
        "xxfi_eoh": "CHMRTN",
        "xxfi_body": "CHMRTN",
        "xxfi_eom": "CHMRTNE",
    }
    watched.ask(MACROS["M"], PACKETS[Stage.MAIL], RCPT, PACKETS[Stage.UNKNOWN], commands.Abort())
    assert seen["xxfi_envfrom"] == seen["xxfi_envrcpt"] == seen["xxfi_unknown"] == "CHM"
    assert seen["xxfi_abort"] == "CHM"
    watched.ask(PACKETS[Stage.HELO])
    assert seen["xxfi_helo"] == "CH"
    watched.close()
    assert seen["xxfi_close"] == "CH"


# Failures


@pytest.mark.parametrize("coroutines", [False, True], ids=["plain", "coroutine"])
@pytest.mark.parametrize("stage", CALLBACKS, ids=CALLBACKS.get)
def test_what_a_callback_raises_is_passed_on_and_the_message_is_aborted_later(
    stage: Stage, coroutines: bool
) -> None:
    def broken(milter: Any) -> None:
        raise ZeroDivisionError

    watched = Watched({CALLBACKS[stage]: broken}, coroutines=coroutines)
    with pytest.raises(ZeroDivisionError):
        watched.ask(PACKETS[stage])
    watched.ask(commands.Abort())
    aborted = stage not in (Stage.CONNECT, Stage.HELO, Stage.UNKNOWN, Stage.EOM)
    assert ("xxfi_abort" in watched.names) == aborted


def test_what_nobody_waits_for_fails_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Its traceback is logged, and the next message is not affected."""

    def broken(milter: Any) -> None:
        raise ZeroDivisionError

    watched = Watched({"xxfi_abort": broken, "xxfi_close": broken})
    watched.ask(PACKETS[Stage.MAIL])
    watched.ask(PACKETS[Stage.MAIL])
    assert watched.close() == b""
    assert watched.names == [
        "xxfi_envfrom", "xxfi_abort", "xxfi_envfrom", "xxfi_abort", "xxfi_close",
    ]  # fmt: skip
    assert capsys.readouterr().err.count("\nZeroDivisionError\n") == 3


def test_an_object_that_hears_of_aborts_is_asked_at_the_end_too() -> None:
    class Aborts(Milter):
        def xxfi_envfrom(self, argv: object) -> Any:
            return ReturnCodes.CONTINUE

    assert not as_dialect(Aborts).manifest.answers(Stage.EOM)
    Aborts.xxfi_abort = lambda self: None  # type: ignore[method-assign]
    assert as_dialect(Aborts).manifest.answers(Stage.EOM)


@pytest.mark.parametrize(("version", "left"), [(2, ""), (3, "unknown"), (4, "data unknown")])
def test_an_object_of_an_old_version_is_not_asked_what_that_did_not_have(
    version: int, left: str
) -> None:
    class Old(Milter):
        def xxfi_negotiate(self, actions: int, protocol: int) -> Any:
            return [ReturnCodes.CONTINUE, version, 0, 0]

        def xxfi_data(self) -> Any:
            return ReturnCodes.CONTINUE

        def xxfi_unknown(self, command: str) -> Any:
            return ReturnCodes.CONTINUE

    manifest = as_dialect(Old).manifest
    assert " ".join(sorted(stage.word for stage in manifest.answered - {Stage.EOM})) == left


def test_what_abort_and_close_return_does_not_matter() -> None:
    watched = Watched({"xxfi_abort": 42, "xxfi_close": "bye"})
    watched.ask(PACKETS[Stage.MAIL])
    assert watched.close() == b""


def test_a_connection_is_closed_once() -> None:
    watched = Watched()
    watched.ask(PACKETS[Stage.HELO])
    [context] = watched.dialect._contexts.values()  # type: ignore[attr-defined]
    watched.close()
    assert context.answer(None, b"", b"") == b""
    assert watched.names == ["xxfi_helo", "xxfi_close"]
