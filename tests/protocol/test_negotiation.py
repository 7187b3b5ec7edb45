"""Option negotiation: what is agreed, for every offer and any number of milters."""

from __future__ import annotations

from functools import reduce
from operator import or_

import pytest
from cells import every, rows
from hypothesis import given
from hypothesis import strategies as st

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol.commands import Negotiate
from sharded_milter.protocol.negotiation import (
    DEFAULT_MACROS,
    MAX_MACROS,
    Agreement,
    Handling,
    Manifest,
    merged_macros,
    merged_protocol,
    negotiate,
)
from sharded_milter.protocol.stages import Actions, Protocol, Stage
from sharded_milter.protocol.wire import PAYLOAD

from .strategies import ALL_ACTIONS, ALL_PROTOCOL, OFFER, manifests, offers

P = Protocol
S = Stage

# The bits as they are on the wire: what suppresses a stage and what leaves it unanswered.
BITS = {
    S.CONNECT: (0x1, 0x1000),
    S.HELO: (0x2, 0x2000),
    S.MAIL: (0x4, 0x4000),
    S.RCPT: (0x8, 0x8000),
    S.DATA: (0x200, 0x10000),
    S.HEADER: (0x20, 0x80),
    S.EOH: (0x40, 0x40000),
    S.BODY: (0x10, 0x80000),
    S.UNKNOWN: (0x100, 0x20000),
}
NO_ALL, NR_ALL = 0x37F, 0xFF080
SKIP, RCPT_REJ, HDR_LEADSPC = 0x400, 0x800, 0x100000
MDS_256K, MDS_1M = 0x10000000, 0x20000000

# What MTAs offer: version, actions, protocol.
OFFERED = {
    "Sendmail 8.14": (6, 0x1FF, 0x1FFFFF),
    "Sendmail with MDS": (6, 0x1FF, 0x301FFFFF),
    "Postfix 2.6": (6, 0x1FF, 0x1FFFFF),
    "Postfix protocol 4": (4, 0x1FF, 0x37F),
    "Postfix protocol 3": (3, 0x1FF, 0x17F),
    "Postfix protocol 2": (2, 0x1FF, 0x7F),
    "Postfix protocol 2 no_header_reply": (2, 0x1FF, 0xFF),
    "Postfix 2.3": (2, 0x3D, 0x7F),
    "Postfix 2.4": (2, 0x3F, 0x7F),
    "Postfix 2.5": (2, 0x13F, 0x7F),
    "Sendmail 8.13": (2, 0x3F, 0x7F),
}


def wanting(protocol: int = 0, actions: int = 0) -> Manifest:
    return Manifest("milter", Actions(actions), Protocol(protocol))


def asking(stage: Stage, *names: str) -> Manifest:
    """A milter that asks for macros of a stage."""
    return Manifest("milter", macros=((stage, names),))


def agreed(protocol: int, offered: int = ALL_PROTOCOL) -> Agreement:
    return negotiate(Negotiate(6, ALL_ACTIONS, offered), [wanting(protocol)])


def test_stages_have_the_bits_of_the_wire() -> None:
    assert {s: (s.suppress, s.no_reply) for s in BITS} == BITS
    assert S.EOM.suppress == 0
    assert S.EOM.no_reply > ALL_PROTOCOL  # never reaches an MTA


# Versions and masks


@pytest.mark.parametrize(("offered", "answered"), [(2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 6)])
def test_the_lower_version_is_agreed(offered: int, answered: int) -> None:
    assert negotiate(Negotiate(offered, 0x3F, 0x7F), [wanting()]).reply.version == answered


@pytest.mark.parametrize("version", [0, 1])
def test_a_version_below_2_is_refused(version: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"version {version} is below 2"):
        negotiate(Negotiate(version, 0x3F, 0x7F), [wanting()])


def test_an_offer_of_nothing_stands_for_version_1() -> None:
    everything = wanting(NO_ALL, ALL_ACTIONS)
    reply = negotiate(Negotiate(2, 0, 0), [everything]).reply
    assert (reply.actions, reply.protocol) == (0xF, 0x3F)


@every(
    [Negotiate(*words) for words in OFFERED.values()],
    [0, NO_ALL, NR_ALL, SKIP | RCPT_REJ | HDR_LEADSPC],
)
def test_the_answer_is_what_is_wanted_and_offered(offer: Negotiate, wanted: int) -> None:
    agreement = negotiate(offer, [wanting(wanted, ALL_ACTIONS)])
    assert agreement.reply == Negotiate(
        min(6, offer.version),
        offer.actions & ALL_ACTIONS,
        wanted & offer.protocol,
    )
    assert agreement.actions == Actions(agreement.reply.actions)
    assert agreement.protocol == Protocol(agreement.reply.protocol)


@given(offers, st.lists(manifests, max_size=4), st.sampled_from([0, MDS_256K, MDS_1M]))
def test_nothing_is_ever_answered_that_was_not_offered(
    offer: Negotiate, milters: list[Manifest], mds: int
) -> None:
    reply = negotiate(offer, milters, Protocol(mds)).reply
    assert reply.version == min(6, offer.version)
    assert reply.actions & ~(offer.actions or 0xF) == 0
    known = ALL_PROTOCOL | mds
    assert reply.protocol & ~((offer.protocol or 0x3F) & known) == 0
    assert not reply.symlists or offer.actions & Actions.SETSYMLIST
    assert Negotiate.parse(reply.encode()[PAYLOAD:]) == reply


@pytest.mark.parametrize("bit", [MDS_256K, MDS_1M])
def test_larger_packets_are_agreed_only_when_asked_for_and_offered(bit: int) -> None:
    offer = Negotiate(6, ALL_ACTIONS, ALL_PROTOCOL | bit)
    greedy = wanting(bit)
    assert negotiate(offer, [greedy]).protocol == 0
    assert negotiate(offer, [greedy], Protocol(bit)).protocol == bit
    assert negotiate(OFFER, [greedy], Protocol(bit)).protocol == 0
    other = Protocol(MDS_256K | MDS_1M) & ~Protocol(bit)
    assert negotiate(offer, [greedy], other).protocol == 0
    assert negotiate(offer, [greedy], Protocol(NO_ALL)).protocol == 0


# Who answers

# What a milter wants, what of it the MTA offers, and what follows for the command.
HANDLINGS = [
    ("nothing", "all", Handling.ASK, "kept"),
    ("nothing", "none", Handling.ASK, "kept"),
    ("NR", "all", Handling.NO_REPLY, "kept"),
    ("NR", "none", Handling.CONTINUE, "kept"),
    ("NO", "all", Handling.CONTINUE, "not kept"),
    ("NO", "none", Handling.CONTINUE, "not kept"),
    ("NO and NR", "all", Handling.CONTINUE, "not kept"),
    ("NO and NR", "none", Handling.CONTINUE, "not kept"),
]


@rows((stage, *handling) for stage in BITS for handling in HANDLINGS)
def test_what_the_mta_cannot_leave_out_is_answered_here(
    stage: Stage, wants: str, offers_: str, handling: Handling, kept: str
) -> None:
    no, nr = BITS[stage]
    wanted = {"nothing": 0, "NR": nr, "NO": no, "NO and NR": no | nr}[wants]
    offered = {"all": ALL_PROTOCOL, "none": ALL_PROTOCOL & ~(no | nr)}[offers_]
    agreement = agreed(wanted, offered)
    assert agreement.handling[stage.code] is handling
    assert (stage.code in agreement.recorded) is (kept == "kept")
    others = {s.code for s in Stage} - {stage.code}
    assert {agreement.handling[code] for code in others} == {Handling.ASK}
    assert others <= agreement.recorded


def test_the_end_of_message_is_answered_here_when_no_milter_has_a_say() -> None:
    agreement = agreed(Protocol.NR_EOM)
    assert agreement.protocol == 0
    assert agreement.handling[S.EOM.code] is Handling.CONTINUE
    both = negotiate(OFFER, [wanting(Protocol.NR_EOM), wanting()])
    assert both.handling[S.EOM.code] is Handling.ASK


@given(offers, st.lists(manifests, max_size=4))
def test_the_mta_and_we_agree_on_who_waits(offer: Negotiate, milters: list[Manifest]) -> None:
    agreement = negotiate(offer, milters)
    for stage in Stage:
        handling = agreement.handling[stage.code]
        promised = bool(agreement.protocol & stage.no_reply)
        assert (handling is Handling.NO_REPLY) is promised
        somebody = any(milter.answers(stage) for milter in milters)
        assert (handling is Handling.ASK) is somebody
        seen = any(not milter.protocol & stage.suppress for milter in milters)
        assert (stage.code in agreement.recorded) is (seen or stage is S.EOM)
        if seen:
            assert not agreement.protocol & stage.suppress


# Several milters

MERGES = [
    # each wants, together
    ([], NO_ALL | Protocol.NR_EOM),
    ([0], 0),
    ([P.NO_RCPT, P.NO_RCPT], P.NO_RCPT),
    ([P.NO_RCPT, 0], 0),
    ([P.NO_RCPT, P.NR_RCPT], P.NR_RCPT),
    ([P.NR_RCPT, P.NR_RCPT], P.NR_RCPT),
    ([P.NR_RCPT, 0], 0),
    ([P.NO_RCPT | P.NR_RCPT], P.NO_RCPT),
    ([P.NO_RCPT | P.NR_RCPT, P.NR_RCPT], P.NR_RCPT),
    ([NO_ALL, NO_ALL], NO_ALL),
    ([NO_ALL, NR_ALL], NR_ALL),
    # A rejected recipient is shown when one wants it.
    ([P.RCPT_REJ, 0], P.RCPT_REJ),
    ([0, P.RCPT_REJ | P.NO_BODY], P.RCPT_REJ),
    # The others are taken when all take them whom they concern, and somebody wants them.
    ([P.SKIP, P.SKIP], P.SKIP),
    ([P.SKIP, 0], 0),
    ([P.SKIP, P.NR_BODY], 0),
    ([P.SKIP, P.NO_BODY], P.SKIP),
    ([P.NO_BODY], P.NO_BODY),
    ([P.HDR_LEADSPC, P.HDR_LEADSPC], P.HDR_LEADSPC),
    ([P.HDR_LEADSPC, 0], 0),
    ([P.HDR_LEADSPC, P.NO_HEADER], P.HDR_LEADSPC),
    ([P.NO_HEADER], P.NO_HEADER),
    ([P.NR_EOM, P.NR_EOM], P.NR_EOM),
    ([P.NR_EOM, 0], 0),
]


@pytest.mark.parametrize(("each", "together"), MERGES)
def test_what_several_milters_want_is_merged(each: list[int], together: int) -> None:
    assert merged_protocol(map(wanting, each)) == together
    assert merged_protocol(map(wanting, reversed(each))) == together


@pytest.mark.parametrize("action", [Actions.ADDHDRS, Actions.CHGHDRS])
def test_a_milter_that_writes_headers_is_concerned_about_their_blanks(action: Actions) -> None:
    writer = wanting(P.NO_HEADER, action)
    assert merged_protocol([wanting(P.HDR_LEADSPC), writer]) == 0


@given(st.lists(manifests, min_size=1, max_size=3))
def test_the_actions_of_all_are_merged(milters: list[Manifest]) -> None:
    wanted = reduce(or_, (milter.actions for milter in milters)) & ~Actions.SETSYMLIST
    assert negotiate(OFFER, milters).actions & ~Actions.SETSYMLIST == wanted


# Symbol lists


def names(milters: list[Manifest], stage: Stage) -> list[str]:
    return dict(merged_macros(milters))[stage.symlist or 0].split()


def test_symbol_lists_have_the_numbers_of_the_wire() -> None:
    wanted = {"CONNECT": 0, "HELO": 1, "MAIL": 2, "RCPT": 3, "DATA": 4, "EOM": 5, "EOH": 6}
    assert {stage.name: stage.symlist for stage in Stage if stage.symlist is not None} == wanted
    reply = negotiate(OFFER, [asking(S.EOM, "{x}y")]).reply
    assert reply.actions == Actions.SETSYMLIST
    assert reply.encode()[PAYLOAD + 12 :] == (
        b"\0\0\0\5i {msg_id} {x}y\0" + b"\0\0\0\6i\0"  # binary, end of message before its header
    )


def test_macros_are_asked_for_only_where_that_is_offered() -> None:
    offer = Negotiate(6, ALL_ACTIONS & ~Actions.SETSYMLIST, ALL_PROTOCOL)
    reply = negotiate(offer, [asking(S.EOM, "j")]).reply
    assert (reply.actions, reply.symlists) == (0, ())


def test_nobody_asking_leaves_the_lists_of_the_mta() -> None:
    assert negotiate(OFFER, [wanting(), wanting()]).reply == Negotiate(6, 0, 0)


@pytest.mark.parametrize("stage", [S.EOM, S.EOH])
def test_end_of_message_and_end_of_headers_are_listed_together(stage: Stage) -> None:
    lists = dict(merged_macros([asking(stage, "j")]))
    assert set(lists) == {5, 6}
    assert "j" in lists[stage.symlist or 0].split()


@pytest.mark.parametrize("stage", DEFAULT_MACROS)
def test_the_usual_macros_are_kept(stage: Stage) -> None:
    usual = DEFAULT_MACROS[stage].split()
    assert names([asking(stage, "{extra}")], stage) == [*usual, "{extra}"]


def test_names_are_asked_for_once_whoever_wants_them_and_however_they_are_spelled() -> None:
    milters = [asking(S.RCPT, "j", "{i}", "{x}"), asking(S.RCPT, "{j}", "{auth_authen}", "x")]
    usual = DEFAULT_MACROS[S.RCPT].split()
    assert names(milters, S.RCPT) == [*usual, "j", "x", "{auth_authen}"]


def test_a_list_has_at_most_50_names_the_usual_among_them() -> None:
    assert MAX_MACROS == 50
    many = tuple(f"{{m{n}}}" for n in range(100))
    asked = names([asking(S.MAIL, *many)], S.MAIL)
    assert len(asked) == 50
    assert set(DEFAULT_MACROS[S.MAIL].split()) < set(asked)


@pytest.mark.parametrize("stage", [s for s in Stage if s.symlist is None])
def test_a_stage_without_macros_is_passed_over(stage: Stage) -> None:
    assert merged_macros([asking(stage, "i")]) == ()
    packet = asking(stage, "i").to_packet()
    assert Negotiate.parse(packet[PAYLOAD:]).symlists == ()


@given(st.lists(manifests, max_size=4))
def test_every_milter_gets_its_macros(milters: list[Manifest]) -> None:
    for number, text in merged_macros(milters):
        listed = text.split()
        assert len(listed) == len(set(listed)) <= MAX_MACROS
        stage = next(stage for stage in Stage if stage.symlist == number)
        wanted = {n for m in milters for s, asked in m.macros for n in asked if s is stage}
        bare = {n[1] if len(n) == 3 else n for n in wanted | set(DEFAULT_MACROS[stage].split())}
        assert set(listed) == bare or (len(listed) == MAX_MACROS and set(listed) < bare)


# The way from a worker to the master


@given(manifests)
def test_a_manifest_survives_the_way_to_the_master(manifest: Manifest) -> None:
    payload = manifest.to_packet()[PAYLOAD:]
    again = Manifest.from_packet(manifest.name, payload, manifest.light, manifest.shard_by)
    assert again == manifest


@pytest.mark.parametrize("number", [7, 0xFFFFFFFF])
def test_macros_for_a_stage_of_nobody_are_an_error(number: int) -> None:
    payload = Negotiate(6, 0, 0, ((number, "i"),)).payload()
    with pytest.raises(RemoteProtocolError, match=f"number {number}"):
        Manifest.from_packet("milter", payload, frozenset(), "")


def test_a_milter_answers_where_it_neither_declines_nor_keeps_silent() -> None:
    manifest = wanting(P.NO_HELO | P.NR_RCPT | P.NR_EOM)
    assert {stage for stage in Stage if not manifest.answers(stage)} == {S.HELO, S.RCPT, S.EOM}


def test_an_agreement_is_shared_and_cannot_be_changed() -> None:
    first, second = (negotiate(OFFER, [wanting(P.NO_HELO)]) for _ in range(2))
    assert first is second
    with pytest.raises(TypeError):
        first.handling[S.HELO.code] = Handling.ASK  # type: ignore[index]  # the point of the test
