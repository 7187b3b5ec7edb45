"""Option negotiation: what the MTA offers, what the milters want, what we answer.

The law: never a bit that was not offered. What a milter wants and the MTA cannot do is done
here instead: a stage that cannot be suppressed, or that cannot go unanswered, gets our CONTINUE.
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

# Every bit that version 6 defines; the rest is libmilter-internal (SMFI_INTERNAL) or unborn.
KNOWN_ACTIONS = 0x1FF
KNOWN_PROTOCOL = 0x1FFFFF

# Bits beside NO and NR that a milter can ask for; the MTA does them only if all is agreed.
OPTIONS = Protocol.SKIP | Protocol.RCPT_REJ | Protocol.HDR_LEADSPC

# Larger packets than everybody takes; echoed only where the operator wants them.
MDS = Protocol.MDS_256K | Protocol.MDS_1M

# How operators name the sizes, as smfi_setmaxdatasize does.
DATA_SIZES = {"64K": NO_PROTOCOL, "256K": Protocol.MDS_256K, "1M": Protocol.MDS_1M}

HEADER_ACTIONS = Actions.ADDHDRS | Actions.CHGHDRS

# Sendmail's limit on the names of one symbol list.
MAX_MACROS = 50

SUPPRESS_ALL = reduce(or_, (stage.suppress for stage in Stage))
NO_REPLY_ALL = reduce(or_, (stage.no_reply for stage in Stage))

# The macros that Postfix and Sendmail send unasked. A list of ours replaces theirs, so a milter
# that asks for one more macro would lose these if we did not repeat them.
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


class Pinning(Enum):
    """What ties the questions about one connection to one place."""

    NONE = "none"  # nothing: whoever has the transcript can answer
    REPLAYABLE = "replayable"  # an object, which can be rebuilt elsewhere from the transcript
    PINNED = "pinned"  # an object that cannot


@dataclass(frozen=True)
class Manifest:
    """What the master knows of a milter: plain data, carried as an option negotiation packet.

    `protocol` has the NO bits of the stages it needs nothing of, the NR bits of those it wants
    to see but has no say in, and its OPTIONS. `macros` are asked for on top of the usual ones.
    NR_EOM says that it has no say at end of message, where all others are asked. `version` is the
    highest of the protocol that it speaks.
    """

    name: str
    actions: Actions = NO_ACTIONS
    protocol: Protocol = NO_PROTOCOL
    macros: tuple[tuple[Stage, tuple[str, ...]], ...] = ()
    light: frozenset[Stage] = frozenset()
    shard_by: str = ""
    pinning: Pinning = Pinning.NONE
    version: int = VERSION

    @cached_property
    def answered(self) -> frozenset[Stage]:
        """The stages at which the milter gives verdicts."""
        return frozenset(
            stage for stage in Stage if not self.protocol & (stage.suppress | stage.no_reply)
        )

    def answers(self, stage: Stage) -> bool:
        """Whether the milter gives verdicts at the stage."""
        return stage in self.answered

    def to_packet(self) -> bytes:
        """The negotiable part, for the way from the worker to the master."""
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
        pinning: Pinning = Pinning.NONE,
    ) -> Manifest:
        """The manifest whose negotiable part is the payload of `to_packet`.

        Raises RemoteProtocolError where it is malformed.
        """
        words = Negotiate.parse(payload)
        try:
            macros = tuple(
                (SYMLIST_STAGES[number], tuple(text.split())) for number, text in words.symlists
            )
        except KeyError as error:
            raise RemoteProtocolError(f"macros for a stage of number {error}") from None
        actions, protocol = Actions(words.actions), Protocol(words.protocol)
        return cls(name, actions, protocol, macros, light, shard_by, pinning, words.version)


class Handling(Enum):
    """What becomes of a command that a milter could answer."""

    ASK = "ask"  # a milter answers
    CONTINUE = "continue"  # the MTA waits, no milter cares: we answer
    SILENT = "silent"  # agreed that nobody answers


@dataclass(frozen=True)
class Agreement:
    """What was negotiated on one connection."""

    reply: Negotiate
    handling: Mapping[int, Handling]  # by the letter of the stage
    recorded: frozenset[int]  # letters of the stages that some milter needs to see
    # What sessions have found out under it, for all others: it is the same for most connections.
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def actions(self) -> Actions:
        return Actions(self.reply.actions)

    @cached_property
    def protocol(self) -> Protocol:
        return Protocol(self.reply.protocol)


def negotiate(
    offer: Negotiate, manifests: Iterable[Manifest], mds: Protocol = NO_PROTOCOL
) -> Agreement:
    """What we answer to an offer so that each of the milters gets at least what it wants.

    `mds` are the MDS bits that we take if they are offered. Raises RemoteProtocolError for a
    version below 2.
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
    """The protocol word that serves all: suppressed is what all suppress.

    A stage goes unanswered when nobody answers it. An option is taken when somebody wants it and
    all whom it concerns do, except that rejected recipients are sent when one milter wants them.
    """
    manifests = list(manifests)
    words = [m.protocol | _implied_no_reply(m.protocol) | _unconcerned(m) for m in manifests]
    common = reduce(and_, words, SUPPRESS_ALL | NO_REPLY_ALL | OPTIONS)
    wanted = reduce(or_, (m.protocol for m in manifests), NO_PROTOCOL) & OPTIONS
    stages = common & ~OPTIONS
    return Protocol(
        (stages & ~_implied_no_reply(stages)) | (common & wanted) | (wanted & Protocol.RCPT_REJ)
    )


def merged_macros(manifests: Iterable[Manifest]) -> tuple[tuple[int, str], ...]:
    """The symbol lists that give every milter its macros besides the usual ones."""
    lists: dict[int, dict[str, None]] = {}
    for manifest in manifests:
        for stage, names in manifest.macros:
            if stage.symlist is not None:
                lists.setdefault(stage.symlist, _usual(stage)).update(
                    dict.fromkeys(map(_spelling, names))
                )
    ends = (Stage.EOM, Stage.EOH)
    if not lists.keys().isdisjoint(SYMLIST_NUMBERS[stage] for stage in ends):
        # Sendmail honours the list of end of message only if end of headers is listed too, and
        # sends no macro at all at end of message if only end of headers is.
        for stage in ends:
            lists.setdefault(SYMLIST_NUMBERS[stage], _usual(stage))
    return tuple(
        (number, " ".join(list(names)[:MAX_MACROS])) for number, names in sorted(lists.items())
    )


def _usual(stage: Stage) -> dict[str, None]:
    return dict.fromkeys(DEFAULT_MACROS[stage].split())


def _spelling(name: str) -> str:
    """The one spelling of a macro's name: one character stands bare."""
    return name[1] if len(name) == 3 and name[0] == "{" and name[2] == "}" else name


def _unconcerned(manifest: Manifest) -> Protocol:
    """The options that make no difference to a milter, which is not asked about them."""
    skip = Protocol.SKIP if manifest.protocol & Protocol.NO_BODY else NO_PROTOCOL
    headers = not manifest.protocol & Protocol.NO_HEADER or manifest.actions & HEADER_ACTIONS
    return skip | (NO_PROTOCOL if headers else Protocol.HDR_LEADSPC)


def _implied_no_reply(word: Protocol) -> Protocol:
    """A milter that does not even need a stage does not answer it either."""
    bits = (stage.no_reply for stage in Stage if word & stage.suppress)
    return reduce(or_, bits, NO_PROTOCOL)


def _handling(stage: Stage, wanted: Protocol, agreed: Protocol) -> Handling:
    if agreed & stage.no_reply:
        return Handling.SILENT
    if wanted & (stage.suppress | stage.no_reply):
        return Handling.CONTINUE
    return Handling.ASK
