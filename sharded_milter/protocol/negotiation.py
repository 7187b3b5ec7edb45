"""Option negotiation: the MTA's offer, the milters' manifests, and our reply.

The reply never has a bit that was not offered. If the MTA cannot do what the milters want, the
master does it: it replies CONTINUE at a stage that cannot be suppressed or left without a reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache, reduce
from operator import and_, or_
from types import MappingProxyType
from typing import Any

from sharded_milter.errors import RemoteProtocolError
from sharded_milter.protocol.commands import Negotiate
from sharded_milter.protocol.stages import (
    NO_ACTIONS,
    NO_PROTOCOL,
    SYMLIST_NUMBERS,
    SYMLIST_STAGES,
    Actions,
    Protocol,
    Stage,
)

VERSION = 6
LOWEST_VERSION = 2

# What an offer of 0 stands for: libmilter's V1_ACTS and V1_PROT.
DEFAULT_ACTIONS = 0xF
DEFAULT_PROTOCOL = 0x3F

# Every bit that version 6 defines; the rest is libmilter-internal (SMFI_INTERNAL) or reserved.
KNOWN_ACTIONS = 0x1FF
KNOWN_PROTOCOL = 0x1FFFFF

# Options other than NO and NR that a milter can ask for.
OPTIONS = Protocol.SKIP | Protocol.RCPT_REJ | Protocol.HDR_LEADSPC

# Packets larger than 64 KB; accepted only if the operator allows them (--max-data-size).
MDS = Protocol.MDS_256K | Protocol.MDS_1M

# The operator's names for the maximum packet sizes, as in smfi_setmaxdatasize.
DATA_SIZES = {"64K": NO_PROTOCOL, "256K": Protocol.MDS_256K, "1M": Protocol.MDS_1M}

HEADER_ACTIONS = Actions.ADDHDRS | Actions.CHGHDRS

# Sendmail's limit on the names of one symbol list.
MAX_MACROS = 50

SUPPRESS_ALL = reduce(or_, (stage.suppress for stage in Stage))
NO_REPLY_ALL = reduce(or_, (stage.no_reply for stage in Stage))

# The macros that Postfix and Sendmail send by default. A list of ours replaces theirs, so a milter
# that asks for one more macro would lose these if the list did not repeat them.
DEFAULT_MACROS: Mapping[Stage, str] = {
    Stage.CONNECT: "j _ {daemon_name} {daemon_addr} {if_name} {if_addr} v",
    Stage.HELO: "{tls_version} {cipher} {cipher_bits} {cert_subject} {cert_issuer}",
    Stage.MAIL: "i {auth_type} {auth_authen} {auth_ssf} {auth_author} {mail_addr} {mail_host}"
    " {mail_mailer}",
    Stage.RCPT: "i {rcpt_addr} {rcpt_host} {rcpt_mailer}",
    Stage.DATA: "i",
    Stage.EOH: "i",
    Stage.EOM: "i {msg_id}",
}


class SessionAffinity(Enum):
    """Whether all jobs of a connection must go to the shard that has the milter's object."""

    NONE = "none"  # the milter has no object: any shard can answer from the transcript
    REPLAYABLE = "replayable"  # another shard can rebuild the object from the transcript
    REQUIRED = "required"  # the object cannot be rebuilt


@dataclass(frozen=True)
class Manifest:
    """The master's description of a milter: plain data, sent as an option negotiation packet.

    `protocol` has the NO bits of the stages whose commands it does not need, the NR bits of the
    stages that it sees but gives no verdicts at, and its OPTIONS. NR_EOM means that it gives no
    verdict at end of message. `macros` are requested in addition to DEFAULT_MACROS. `light` are the
    stages at which it is fast. `version` is the highest protocol version that it supports.
    """

    name: str
    actions: Actions = NO_ACTIONS
    protocol: Protocol = NO_PROTOCOL
    macros: tuple[tuple[Stage, tuple[str, ...]], ...] = ()
    light: frozenset[Stage] = frozenset()
    shard_by: str = ""
    affinity: SessionAffinity = SessionAffinity.NONE
    version: int = VERSION

    @cached_property
    def answered(self) -> frozenset[Stage]:
        """The stages at which the milter gives verdicts."""
        return frozenset(
            stage for stage in Stage if not self.protocol & (stage.suppress | stage.no_reply)
        )

    def answers(self, stage: Stage) -> bool:
        """Return True if the milter gives verdicts at the stage."""
        return stage in self.answered

    def to_packet(self) -> bytes:
        """Return the negotiable part as a packet, which the worker sends to the master."""
        numbers = ((stage.symlist, names) for stage, names in self.macros)
        lists = ((number, " ".join(names)) for number, names in numbers if number is not None)
        return Negotiate(self.version, self.actions, self.protocol, tuple(lists)).encode()

    @classmethod
    def from_packet(
        cls,
        name: str,
        payload: bytes,
        light: frozenset[Stage],
        shard_by: str,
        affinity: SessionAffinity = SessionAffinity.NONE,
    ) -> Manifest:
        """Return the manifest whose negotiable part is `payload`, as `to_packet` makes it.

        Raise RemoteProtocolError if it is malformed.
        """
        words = Negotiate.parse(payload)
        try:
            macros = tuple(
                (SYMLIST_STAGES[number], tuple(text.split())) for number, text in words.symlists
            )
        except KeyError as error:
            raise RemoteProtocolError(f"macros for a stage of number {error}") from None
        actions, protocol = Actions(words.actions), Protocol(words.protocol)
        return cls(name, actions, protocol, macros, light, shard_by, affinity, words.version)


class Handling(Enum):
    """The way to answer a command of one stage."""

    ASK = "ask"  # ask the milters
    CONTINUE = "continue"  # the MTA waits and no milter gives verdicts: reply CONTINUE
    NO_REPLY = "no_reply"  # negotiated: the MTA waits for no reply


@dataclass(frozen=True)
class Agreement:
    """The result of option negotiation on one connection."""

    reply: Negotiate
    handling: Mapping[int, Handling]  # by the stage's letter
    recorded: frozenset[int]  # letters of the stages that some milter needs to see
    # Tables that depend on the agreement only. Most connections have equal agreements and share it.
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def packet(self) -> bytes:
        """The reply as a packet."""
        return self.reply.encode()

    @cached_property
    def actions(self) -> Actions:
        return Actions(self.reply.actions)

    @cached_property
    def protocol(self) -> Protocol:
        return Protocol(self.reply.protocol)


def negotiate(
    offer: Negotiate, manifests: Iterable[Manifest], mds: Protocol = NO_PROTOCOL
) -> Agreement:
    """Return the agreement under which each milter gets at least what its manifest asks for.

    `mds` are the MDS bits to accept if they are offered. Raise RemoteProtocolError for a version
    below 2.
    """
    return _negotiate(offer, tuple(manifests), mds)


# An MTA makes the same offer on every connection, and merging flags costs more than a command.
@lru_cache(maxsize=64)
def _negotiate(offer: Negotiate, manifests: tuple[Manifest, ...], mds: Protocol) -> Agreement:
    if offer.version < LOWEST_VERSION:
        raise RemoteProtocolError(f"milter protocol version {offer.version} is below 2")
    offered_actions = (offer.actions or DEFAULT_ACTIONS) & KNOWN_ACTIONS
    offered = Protocol((offer.protocol or DEFAULT_PROTOCOL) & KNOWN_PROTOCOL)
    wanted = merged_protocol(manifests)
    agreed = wanted & offered
    actions = reduce(or_, (manifest.actions for manifest in manifests), NO_ACTIONS)
    symlists = merged_macros(manifests) if offered_actions & Actions.SETSYMLIST else ()
    if symlists:
        actions |= Actions.SETSYMLIST
    reply = Negotiate(
        min(offer.version, max((m.version for m in manifests), default=VERSION)),
        int(actions & offered_actions),
        int(agreed | (mds & MDS & offer.protocol)),
        symlists,
    )
    return Agreement(
        reply,
        MappingProxyType({stage.code: _handling(stage, wanted, agreed) for stage in Stage}),
        frozenset(stage.code for stage in Stage if not wanted & stage.suppress),
    )


def merged_protocol(manifests: Iterable[Manifest]) -> Protocol:
    """Return the protocol word that fits all milters.

    A stage is suppressed if all milters suppress it, and gets no reply if none gives verdicts at
    it. An option is set if at least one milter wants it and every milter that it affects does;
    RCPT_REJ is set if one milter wants it.
    """
    manifests = list(manifests)
    words = [m.protocol | _implied_no_reply(m.protocol) | _irrelevant_options(m) for m in manifests]
    common = reduce(and_, words, SUPPRESS_ALL | NO_REPLY_ALL | OPTIONS)
    wanted = reduce(or_, (m.protocol for m in manifests), NO_PROTOCOL) & OPTIONS
    stages = common & ~OPTIONS
    return Protocol(
        (stages & ~_implied_no_reply(stages)) | (common & wanted) | (wanted & Protocol.RCPT_REJ)
    )


def merged_macros(manifests: Iterable[Manifest]) -> tuple[tuple[int, str], ...]:
    """Return the symbol lists that have DEFAULT_MACROS and the macros of every milter."""
    lists: dict[int, dict[str, None]] = {}
    for manifest in manifests:
        for stage, names in manifest.macros:
            if stage.symlist is not None:
                lists.setdefault(stage.symlist, _default_macros(stage)).update(
                    dict.fromkeys(map(_normalized, names))
                )
    ends = (Stage.EOM, Stage.EOH)
    if not lists.keys().isdisjoint(SYMLIST_NUMBERS[stage] for stage in ends):
        # Sendmail honours the list of end of message only if end of headers is listed too, and
        # sends no macro at all at end of message if only end of headers is.
        for stage in ends:
            lists.setdefault(SYMLIST_NUMBERS[stage], _default_macros(stage))
    return tuple(
        (number, " ".join(list(names)[:MAX_MACROS])) for number, names in sorted(lists.items())
    )


def _default_macros(stage: Stage) -> dict[str, None]:
    return dict.fromkeys(DEFAULT_MACROS[stage].split())


def _normalized(name: str) -> str:
    """Return a macro's name without braces if it has one character: `i` for `{i}`."""
    return name[1] if len(name) == 3 and name[0] == "{" and name[2] == "}" else name


def _irrelevant_options(manifest: Manifest) -> Protocol:
    """Return the options that make no difference to a milter."""
    skip = Protocol.SKIP if manifest.protocol & Protocol.NO_BODY else NO_PROTOCOL
    headers = not manifest.protocol & Protocol.NO_HEADER or manifest.actions & HEADER_ACTIONS
    return skip | (NO_PROTOCOL if headers else Protocol.HDR_LEADSPC)


def _implied_no_reply(word: Protocol) -> Protocol:
    """Return the NR bits of the stages that `word` suppresses: they get no verdict either."""
    bits = (stage.no_reply for stage in Stage if word & stage.suppress)
    return reduce(or_, bits, NO_PROTOCOL)


def _handling(stage: Stage, wanted: Protocol, agreed: Protocol) -> Handling:
    if agreed & stage.no_reply:
        return Handling.NO_REPLY
    if wanted & (stage.suppress | stage.no_reply):
        return Handling.CONTINUE
    return Handling.ASK
