"""Milters that are functions: their manifests, and the arguments of their callbacks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from itertools import combinations
from typing import Any

import pytest
from cells import every

from sharded_milter import (
    Accept,
    AddHeader,
    Address,
    Connection,
    Discard,
    Envelope,
    Header,
    Headers,
    InvalidVerdict,
    Message,
    Milter,
    Reject,
    TempFail,
)
from sharded_milter.dialects.functions.dialect import (
    ALL_ACTIONS,
    NEEDS,
    FunctionDialect,
    manifest_of,
)
from sharded_milter.protocol import commands, replies
from sharded_milter.protocol.negotiation import Manifest
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.stages import NO_ACTIONS, Protocol, Stage

STAGES = list(NEEDS)
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(STAGES, size)]


def packed(*packets: Packet) -> bytes:
    return b"".join(packet.encode() for packet in packets)


CONNECTION = packed(
    commands.Negotiate(6, 0x1FF, Protocol.HDR_LEADSPC),
    commands.Macro("C", (("j", "mx"),)),
    commands.Connect("client.example", "4", 25, "192.0.2.1"),
    commands.Macro("H"),
    commands.Helo("client"),
)
SENDER = [commands.Macro("M", (("i", "4F1"),)), commands.Mail("<a@example.org>", ("SIZE=9",))]
RECIPIENTS = [commands.Rcpt("<b@example.net>"), commands.Rcpt("<c@example.net>")]
HEADER = [commands.Data(), commands.Header("Subject", " hi"), commands.Eoh()]
BODY = [commands.Body(b"one\r\n"), commands.Eom(b"two\r\n")]
TRANSCRIPTS: dict[Stage, list[Packet]] = {
    Stage.CONNECT: [],
    Stage.HELO: [],
    Stage.MAIL: SENDER,
    Stage.RCPT: [*SENDER, *RECIPIENTS],
    Stage.DATA: [*SENDER, *RECIPIENTS, HEADER[0]],
    Stage.EOH: [*SENDER, *RECIPIENTS, *HEADER],
    Stage.EOM: [*SENDER, *RECIPIENTS, *HEADER, *BODY],
    Stage.UNKNOWN: [commands.Unknown("XYZZY 1")],
}
CLIENT = Connection("client.example", "inet", "192.0.2.1", 25, "client")
FIRST, SECOND = Address("<b@example.net>"), Address("<c@example.net>")
SENT = Address("<a@example.org>", ("SIZE=9",))
ENVELOPE = Envelope(CLIENT, SENT, (FIRST, SECOND))
HEADERS = Headers([Header("Subject", "hi")])
ARGUMENTS: dict[Stage, tuple[Any, ...]] = {
    Stage.CONNECT: (CLIENT,),
    Stage.HELO: (CLIENT,),
    Stage.MAIL: (Envelope(CLIENT, SENT),),
    Stage.RCPT: (SECOND, Envelope(CLIENT, SENT, (FIRST,))),
    Stage.DATA: (ENVELOPE,),
    Stage.EOH: (ENVELOPE, HEADERS),
    Stage.EOM: (Message(ENVELOPE, HEADERS, b"one\r\ntwo\r\n"),),
    Stage.UNKNOWN: ("XYZZY 1", CLIENT),
}


def milter_answering(*stages: Stage, light: bool = False) -> Milter:
    milter = Milter("generated")
    for stage in stages:
        getattr(milter, stage.word)(light=light)(lambda *_: None)
    return milter


def answered(stage: Stage, verdict: Any) -> bytes | Awaitable[bytes]:
    milter = Milter("one")
    getattr(milter, stage.word)(lambda *_: verdict)
    message = packed(*TRANSCRIPTS[stage])
    return FunctionDialect(milter).answer(stage, CONNECTION, message)


@every(SUBSETS)
def test_a_stage_is_answered_if_and_only_if_it_has_a_callback(subset: tuple[Stage, ...]) -> None:
    manifest = manifest_of(milter_answering(*subset))
    assert {stage for stage in Stage if manifest.answers(stage)} == set(subset)


@every(SUBSETS)
def test_what_a_callback_gets_is_sent_and_nothing_else(subset: tuple[Stage, ...]) -> None:
    protocol = manifest_of(milter_answering(*subset)).protocol
    needed = frozenset[Stage]().union(*(NEEDS[stage] for stage in subset)) | {Stage.EOM}
    assert {stage for stage in Stage if not protocol & stage.suppress} == needed
    content = Stage.HEADER in needed
    assert bool(protocol & Protocol.HDR_LEADSPC) == content
    assert not protocol & (Protocol.SKIP | Protocol.RCPT_REJ)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.word)
def test_only_the_end_of_message_needs_actions(stage: Stage) -> None:
    wanted = ALL_ACTIONS if stage is Stage.EOM else NO_ACTIONS
    assert manifest_of(milter_answering(stage)).actions == wanted


def test_a_manifest_has_the_milters_name_macros_and_promises() -> None:
    milter = Milter("spamguard", macros={"eom": ["i"], "connect": ["j"]}, shard_by="sender")
    milter.rcpt(light=True)(lambda recipient, envelope: None)
    milter.eom(lambda message: None)
    manifest = manifest_of(milter)
    assert manifest.name == "spamguard"
    assert manifest.macros == ((Stage.EOM, ("i",)), (Stage.CONNECT, ("j",)))
    assert manifest.light == {Stage.RCPT}
    assert manifest.shard_by == "sender"


def test_a_manifest_survives_the_way_to_the_master() -> None:
    milter = Milter("spamguard", macros={"eom": ["i", "{msg_id}"]}, shard_by="client")
    milter.eom(light=True)(lambda message: None)
    manifest = manifest_of(milter)
    assert (
        Manifest.from_packet("spamguard", manifest.to_packet()[5:], manifest.light, "client")
        == manifest
    )


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.word)
def test_a_callback_gets_all_that_the_mta_has_said_so_far(stage: Stage) -> None:
    got: list[Any] = []
    milter = Milter("one")
    getattr(milter, stage.word)(lambda *arguments: got.append(arguments))
    FunctionDialect(milter).answer(stage, CONNECTION, packed(*TRANSCRIPTS[stage]))
    assert got == [ARGUMENTS[stage]]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.word)
def test_no_opinion_is_continue(stage: Stage) -> None:
    assert answered(stage, None) == packed(replies.Continue())


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.word)
def test_a_refusal_is_told_in_the_authors_words(stage: Stage) -> None:
    assert answered(stage, Reject("no")) == packed(replies.ReplyCode("550 5.7.1 no"))
    assert answered(stage, TempFail("later")) == packed(replies.ReplyCode("451 4.7.1 later"))


def test_discard_and_accept_are_told() -> None:
    assert answered(Stage.MAIL, Discard()) == packed(replies.Discard())
    assert answered(Stage.MAIL, Accept()) == packed(replies.Accept())


def test_actions_are_written_as_the_mta_and_the_milter_agreed() -> None:
    wanted = packed(replies.InsertHeader(0x7FFFFFFF, "X", " v"), replies.Accept())
    assert answered(Stage.EOM, Accept(AddHeader("X", "v"))) == wanted


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        (Stage.RCPT, Accept()),
        (Stage.CONNECT, Discard()),
        (Stage.MAIL, Accept(AddHeader("X", "v"))),
        (Stage.EOM, "accept"),
    ],
    ids=str,
)
def test_what_a_stage_cannot_say_is_an_error(stage: Stage, wrong: Any) -> None:
    with pytest.raises(InvalidVerdict, match=f"the {stage.word} callback returned"):
        answered(stage, wrong)


def test_what_a_callback_raises_is_passed_on() -> None:
    milter = Milter("broken")

    @milter.eom
    def scan(message: Message) -> None:
        raise ZeroDivisionError(message.queue_id)

    with pytest.raises(ZeroDivisionError, match="4F1"):
        FunctionDialect(milter).answer(Stage.EOM, CONNECTION, packed(*TRANSCRIPTS[Stage.EOM]))


def coroutine_milter(verdict: Any) -> FunctionDialect:
    milter = Milter("async")

    @milter.eom
    async def scan(message: Message) -> Any:
        await asyncio.sleep(0)
        return verdict

    return FunctionDialect(milter)


async def awaited(answer: bytes | Awaitable[bytes]) -> bytes:
    assert not isinstance(answer, bytes)
    return await answer


def test_a_coroutine_is_answered_when_it_ends() -> None:
    answer = coroutine_milter(Reject("no")).answer(Stage.EOM, CONNECTION, b"")
    assert asyncio.run(awaited(answer)) == packed(replies.ReplyCode("550 5.7.1 no"))


def test_the_result_of_a_coroutine_is_checked_too() -> None:
    answer = coroutine_milter(5).answer(Stage.EOM, CONNECTION, b"")
    with pytest.raises(InvalidVerdict, match="the eom callback returned 5"):
        asyncio.run(awaited(answer))
