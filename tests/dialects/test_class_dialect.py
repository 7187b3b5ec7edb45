"""Classes and factories as milters: their manifests, and refused ones."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from cells import every
from watched import ALL_ACTIONS, ALL_PROTOCOL, CALLBACKS, ENDS, PACKETS, Watched, agreed

from sharded_milter import Message
from sharded_milter import Milter as Functions
from sharded_milter.dialects.functions.dialect import FunctionDialect
from sharded_milter.dialects.libmilter.classes import MacroStages, Milter, MilterFactory
from sharded_milter.dialects.libmilter.context import ReturnCodes
from sharded_milter.dialects.libmilter.dialect import ClassDialect
from sharded_milter.dialects.loader import NotAMilter, as_dialect
from sharded_milter.errors import CallbackFailed, CallRefused, InvalidValue, MilterLoadError
from sharded_milter.protocol import commands
from sharded_milter.protocol.negotiation import Manifest, SessionAffinity
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import Actions, Protocol, Stage
from sharded_milter.protocol.wire import PAYLOAD, frame

SUBSETS = [subset for size in (0, 1, 2) for subset in combinations(CALLBACKS, size)]
CONTENT = {Stage.HEADER, Stage.EOH, Stage.BODY}
NO_BITS = {
    Stage.CONNECT: 0x1, Stage.HELO: 0x2, Stage.MAIL: 0x4, Stage.RCPT: 0x8, Stage.BODY: 0x10,
    Stage.HEADER: 0x20, Stage.EOH: 0x40, Stage.UNKNOWN: 0x100, Stage.DATA: 0x200, Stage.EOM: 0,
}  # fmt: skip
LEADSPC = 0x100000


def manifest(*stages: Stage, **attributes: Any) -> Manifest:
    return Watched(callbacks=[CALLBACKS[stage] for stage in stages], **attributes).dialect.manifest


def negotiating(answer: Any, *stages: Stage) -> Manifest:
    return manifest(*stages, xxfi_negotiate=lambda *_: answer)


@every(SUBSETS)
def test_what_is_overridden_is_sent_and_content_is_answered_at_its_end(
    subset: tuple[Stage, ...],
) -> None:
    told = manifest(*subset)
    answered = set(subset) - CONTENT
    if CONTENT & set(subset):
        answered.add(Stage.EOM)
    assert {stage for stage in Stage if told.answers(stage)} == answered
    sent = {stage for stage in CALLBACKS if not told.protocol & NO_BITS[stage]}
    assert sent == {*subset, Stage.EOM}
    assert told.actions == (0xFF if Stage.EOM in subset else 0)
    wants_blank = Stage.HEADER in subset or Stage.EOM in subset
    assert bool(told.protocol & LEADSPC) == wants_blank
    assert not told.protocol & (Protocol.SKIP | Protocol.RCPT_REJ)


@every(SUBSETS)
def test_a_manifest_survives_the_way_to_the_master(subset: tuple[Stage, ...]) -> None:
    told = manifest(*subset)
    packet = told.to_packet()[PAYLOAD:]
    assert Manifest.from_packet(told.name, packet, told.light, "", told.affinity) == told


def test_a_manifest_says_who_it_is_and_whether_it_can_be_rebuilt() -> None:
    assert manifest(Stage.EOM).affinity is SessionAffinity.REQUIRED
    assert manifest(Stage.EOM, replayable=True).affinity is SessionAffinity.REPLAYABLE
    assert manifest(Stage.EOM).name == "Watched"
    assert manifest(Stage.EOM).version == 6
    assert manifest(Stage.EOM).light == frozenset()


def test_a_class_opts_in_to_the_sandbox() -> None:
    class Plain(Milter):
        def xxfi_eom(self) -> ReturnCodes:
            return ReturnCodes.ACCEPT

    class Sandboxed(Plain):
        sandbox = True

    assert not as_dialect(Plain).sandbox
    assert as_dialect(Sandboxed).sandbox


def test_a_callback_of_an_object_alone_counts() -> None:
    class Built(Milter):
        def __init__(self, factory: Any, protocol: Any) -> None:
            super().__init__(factory, protocol)
            self.xxfi_helo = lambda helohost: ReturnCodes.REJECT  # type: ignore[method-assign]

    dialect = as_dialect(Built)
    assert dialect.manifest.answers(Stage.HELO)
    assert dialect.answer(Stage.HELO, b"", PACKETS[Stage.HELO].encode()) == frame(b"r")


def test_a_callback_that_is_inherited_counts() -> None:
    class Mixin:
        def xxfi_helo(self, helohost: str) -> ReturnCodes:
            return ReturnCodes.REJECT

    class Built(Mixin, Milter):
        pass

    assert as_dialect(Built).manifest.answers(Stage.HELO)


def test_the_callbacks_of_the_base_class_have_no_opinion() -> None:
    milter = Milter()
    assert (milter.factory, milter.protocol) == (None, None)
    got = [getattr(milter, name)(*[None] * n) for name, n in ARITIES.items()]
    assert got == [ReturnCodes.CONTINUE] * len(ARITIES)
    assert [getattr(milter, name)() for name in ENDS] == [None, None]


ARITIES = {
    "xxfi_connect": 3,
    "xxfi_helo": 1,
    "xxfi_envfrom": 1,
    "xxfi_envrcpt": 1,
    "xxfi_data": 0,
    "xxfi_unknown": 1,
    "xxfi_header": 2,
    "xxfi_eoh": 0,
    "xxfi_body": 1,
    "xxfi_eom": 0,
}

# Negotiation

C = ReturnCodes.CONTINUE
LEFT_OUT = sum(bit for stage, bit in NO_BITS.items() if stage is not Stage.EOM)
NEGOTIATED: list[tuple[Any, int, int]] = [
    (None, 0xFF, 6),
    (C, 0xFF, 6),
    (ReturnCodes.ALL_OPTS, 0xFF, 6),
    (0, 0xFF, 6),
    ((0x11, 0), 0x11, 6),
    ([0x11, 0], 0x11, 6),
    ((0, 0), 0, 6),
    ([C, 6, 0x11, 0], 0x11, 6),
    ((C, 2, 0x11, 0), 0x11, 2),
    ([0, 4, 0x11, 0], 0x11, 4),
    ([ReturnCodes.ALL_OPTS, 5, 0x11, 0], 0xFF, 5),
    ((ALL_ACTIONS, 0), 0xFF, 6),
]


@pytest.mark.parametrize(("answer", "actions", "version"), NEGOTIATED, ids=repr)
def test_negotiation_may_answer_in_these_ways(answer: Any, actions: int, version: int) -> None:
    told = negotiating(answer, Stage.EOM)
    assert (told.actions, told.version) == (actions, version)
    assert told.protocol & LEFT_OUT == LEFT_OUT


FORMS = "it must return actions and protocol, or CONTINUE"
ASKS = "MTAs offer at most 0x1ff and 0x1fffff"
REFUSED: list[tuple[Any, str]] = [
    *((wrong, f"Watched.xxfi_negotiate returned {wrong!r}; {FORMS}") for wrong in (
        ReturnCodes.REJECT, 42, "x", "ab", (), (1,), (1, 2, 3), (1, "2"), (-1, 0), (0, None),
        [ReturnCodes.REJECT, 6, 0, 0], [C, "6", 0, 0], [C, 6, 0, None], (1, 2, 3, 4, 5), {1, 2},
        "abcd")),
    ((0x200, 0), f"Watched.xxfi_negotiate requests actions 0x200 and protocol 0x0; {ASKS}"),
    ((0, 0x200000), f"Watched.xxfi_negotiate requests actions 0x0 and protocol 0x200000; {ASKS}"),
    ((0, Protocol.NR_EOM), "Watched.xxfi_negotiate requests actions 0x0 and protocol 0x80000000"),
    ([C, 1, 0, 0], "Watched.xxfi_negotiate returned version 1, which is not between 2 and 6"),
    ([C, 7, 0, 0], "Watched.xxfi_negotiate returned version 7, which is not between 2 and 6"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "text"), REFUSED, ids=lambda value: repr(value)[:40])
def test_anything_else_cannot_be_loaded(answer: Any, text: str) -> None:
    with pytest.raises(MilterLoadError) as refused:
        negotiating(answer, Stage.EOM)
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize("stage", [stage for stage, bit in NO_BITS.items() if bit])
def test_a_stage_that_was_left_out_is_neither_sent_nor_called(stage: Stage) -> None:
    bits = NO_BITS[stage]
    watched = Watched(xxfi_negotiate=lambda *_: (0, bits))
    told = watched.dialect.manifest
    assert told.protocol & LEFT_OUT == bits
    assert watched.ask(PACKETS[stage]) == frame(b"c")  # another milter has asked for it
    assert watched.calls == []


def test_options_are_taken_where_they_make_a_difference() -> None:
    told = negotiating((0, 0x1FFFFF & ~LEFT_OUT), Stage.RCPT, Stage.HEADER, Stage.EOM)
    assert told.protocol & (Protocol.NR_RCPT | Protocol.RCPT_REJ) == (
        Protocol.NR_RCPT | Protocol.RCPT_REJ
    )
    assert not told.protocol & (Protocol.NR_MAIL | Protocol.NR_EOM | Protocol.SKIP)
    assert not told.answers(Stage.RCPT)
    assert told.answers(Stage.EOM)


def test_each_object_is_told_what_its_mta_offers() -> None:
    seen: list[tuple[int, int]] = []

    class Told(Milter):
        def xxfi_negotiate(self, actions: int, protocol: int) -> tuple[int, int]:
            seen.append((actions, protocol))
            return 0, 0

    dialect = as_dialect(Told)
    packets: list[Packet] = [*agreed(offered=0x3F), PACKETS[Stage.HELO]]
    for session in (1, 2):
        dialect.answer(Stage.HELO, b"".join(p.encode() for p in packets), b"", session)
    assert seen == [(ALL_ACTIONS, ALL_PROTOCOL), (ALL_ACTIONS, 0x3F), (ALL_ACTIONS, 0x3F)]


# Symbol lists

STAGE_OF_LIST = {
    MacroStages.CONNECT: Stage.CONNECT, MacroStages.HELO: Stage.HELO,
    MacroStages.ENVFROM: Stage.MAIL, MacroStages.ENVRCPT: Stage.RCPT,
    MacroStages.DATA: Stage.DATA, MacroStages.EOM: Stage.EOM, MacroStages.EOH: Stage.EOH,
}  # fmt: skip


def asking_for(*lists: tuple[Any, Any]) -> Manifest:
    def ask(milter: Any, actions: int, protocol: int) -> None:
        for stage, macros in lists:
            milter.smfi_setsymlist(stage, macros)

    return manifest(Stage.EOM, xxfi_negotiate=ask)


def test_the_numbers_of_the_lists_are_libmilters() -> None:
    assert [int(stage) for stage in STAGE_OF_LIST] == [0, 1, 2, 3, 4, 5, 6]
    assert set(STAGE_OF_LIST) == set(MacroStages)


@pytest.mark.parametrize("number", STAGE_OF_LIST, ids=lambda stage: stage.name)
@pytest.mark.parametrize("spelled", ["i {auth_type}", "i,{auth_type}", " i , {auth_type} "])
def test_macros_can_be_asked_for_at_every_stage(number: MacroStages, spelled: str) -> None:
    told = asking_for((int(number), spelled))
    assert told.macros == ((STAGE_OF_LIST[number], ("i", "{auth_type}")),)
    assert not told.actions & Actions.SETSYMLIST  # the master asks for that itself


def test_macros_can_be_asked_for_at_several_stages() -> None:
    told = asking_for((MacroStages.EOM, "i"), (MacroStages.CONNECT, "j"))
    assert told.macros == ((Stage.CONNECT, ("j",)), (Stage.EOM, ("i",)))


@pytest.mark.parametrize(
    ("lists", "text"),
    [
        ([(7, "i")], "smfi_setsymlist: 7 is not a stage"),
        ([(-1, "i")], "smfi_setsymlist: -1 is not a stage"),
        ([("eom", "i")], "smfi_setsymlist: 'eom' is not a stage"),
        ([(None, "i")], "smfi_setsymlist: None is not a stage"),
        ([(5, "")], "smfi_setsymlist: '' has no macro names"),
        ([(5, " , ")], "smfi_setsymlist: ' , ' has no macro names"),
        ([(5, None)], "smfi_setsymlist: None has no macro names"),
        ([(5, ["i"])], "smfi_setsymlist: ['i'] has no macro names"),
        ([(5, "i"), (5, "j")], "smfi_setsymlist: the macros of EOM are set already"),
    ],
    ids=repr,
)
def test_what_libmilter_would_not_take_is_refused(lists: list[Any], text: str) -> None:
    with pytest.raises(CallRefused) as refused:
        asking_for(*lists)
    assert str(refused.value) == text


# Names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("xxfi_env_from", "; use xxfi_envfrom"),
        ("xxfi_env_rcpt", "; use xxfi_envrcpt"),
        ("xxfi_mta_connect", "; use xxfi_negotiate, the first callback of a connection"),
        ("xxfi_mta_close", "; use xxfi_close"),
        ("xxfi_ehlo", ""),
        ("xxfi_", ""),
    ],
)
def test_a_callback_that_nobody_would_call_is_refused(name: str, hint: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        type("Old", (Milter,), {name: lambda self: None})
    assert str(refused.value) == f"Old.{name} is not a callback of libmilter{hint}"


@pytest.mark.parametrize("name", [*CALLBACKS.values(), *ENDS, "xxfi_negotiate"])
def test_a_callback_of_libmilter_is_taken(name: str) -> None:
    assert issubclass(type("New", (Milter,), {name: lambda *_: None, "helper": 1}), Milter)


# Whatever an author may write


class Greets(Milter):
    def xxfi_helo(self, helohost: str) -> ReturnCodes:
        return ReturnCodes.CONTINUE


class Factory(MilterFactory):
    milter = Greets


class OwnFactory:
    """A factory without a base class."""

    def build_milter(self, protocol: Any) -> Milter:
        return Greets(self, protocol)


@pytest.mark.parametrize(
    "found",
    [Greets, Factory, Factory(), OwnFactory, OwnFactory()],
    ids=["milter", "factory's class", "factory", "own factory's class", "own factory"],
)
def test_classes_factories_and_their_classes_are_milters_that_are_objects(found: Any) -> None:
    dialect = as_dialect(found)
    assert isinstance(dialect, ClassDialect)
    assert dialect.manifest.name == "Greets"
    assert dialect.manifest.answers(Stage.HELO)


def test_functions_are_a_milter_that_is_no_object() -> None:
    milter = Functions("functions")

    @milter.eom
    def scan(message: Message) -> None:
        return None

    dialect = as_dialect(milter)
    assert isinstance(dialect, FunctionDialect)
    assert dialect.manifest.affinity is SessionAffinity.NONE


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Functions("idle"), "has no callback"),
        (5, "is of type int, not a Milter, a subclass of it, or a factory"),
        (object, "is of type type, not a Milter, a subclass of it, or a factory"),
        (Greets(), "is of type Greets, not a Milter, a subclass of it, or a factory"),
    ],
    ids=["functions", "number", "type", "object"],
)
def test_anything_else_is_no_milter(found: Any, text: str) -> None:
    with pytest.raises(NotAMilter) as refused:
        as_dialect(found)
    assert str(refused.value) == text


@pytest.mark.parametrize("built", [None, 5, Greets], ids=repr)
def test_a_factory_that_builds_no_milter_is_refused(built: Any) -> None:
    class Wrong:
        def build_milter(self, protocol: Any) -> Any:
            return built

    with pytest.raises(MilterLoadError) as refused:
        as_dialect(Wrong)
    assert str(refused.value) == f"Wrong.build_milter returned {built!r}, not a Milter"


def test_an_object_knows_its_factory_and_its_connection() -> None:
    built: list[Milter] = []

    class Keeps(Greets):
        def __init__(self, factory: Any, protocol: Any) -> None:
            super().__init__(factory, protocol)
            built.append(self)

    factory = MilterFactory()
    factory.milter = Keeps
    dialect = as_dialect(factory)
    for session in (1, 2):
        dialect.answer(Stage.HELO, b"", PACKETS[Stage.HELO].encode(), session)
    assert all(milter.factory is factory for milter in built)
    assert all(milter.protocol is milter._context for milter in built)
    assert len({id(milter.protocol) for milter in built}) == 3  # the first was negotiated with


def test_an_object_need_not_call_the_constructor_of_its_class() -> None:
    class Careless(Greets):
        def __init__(self, factory: Any, protocol: Any) -> None:
            pass

    dialect = as_dialect(Careless)
    assert dialect.answer(Stage.HELO, b"", PACKETS[Stage.HELO].encode(), 1) == frame(b"c")


def test_an_object_that_cannot_be_built_is_not_built_later_with_half_the_story() -> None:
    works = [True, False, True]

    class Fails(OwnFactory):
        def build_milter(self, protocol: Any) -> Milter:
            if not works.pop(0):
                raise ZeroDivisionError
            return super().build_milter(protocol)

    dialect = as_dialect(Fails)
    helo = PACKETS[Stage.HELO].encode()
    with pytest.raises(ZeroDivisionError):
        dialect.answer(Stage.HELO, b"", helo, 1)
    for _ in range(2):
        with pytest.raises(CallbackFailed, match="the Greets object of this connection could"):
            dialect.answer(Stage.HELO, b"", helo, 1)
    assert dialect.answer(None, b"", b"", 1) == b""
    assert dialect.answer(Stage.HELO, b"", helo, 2) == frame(b"c")


def test_whoever_measures_calls_every_callback_himself() -> None:
    timed: list[tuple[str, tuple[Any, ...]]] = []
    watched = Watched()

    def call(name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
        timed.append((name, arguments))
        return function(*arguments)

    watched.dialect.call = call
    watched.ask(PACKETS[Stage.HELO], PACKETS[Stage.MAIL], commands.Abort())
    watched.close()
    assert [name for name, _ in timed] == watched.names
    assert timed[0] == ("xxfi_helo", ("client",))


def test_an_object_that_never_was_has_no_end() -> None:
    built: list[str] = []

    class Notes(Milter):
        def xxfi_close(self) -> None:
            built.append("closed")

    assert as_dialect(Notes).answer(None, b"", b"", 7) == b""
    assert built == []
