"""The stages of a conversation, with the protocol's bits and numbers for each stage."""

from __future__ import annotations

from enum import Enum, IntFlag


class Actions(IntFlag):
    """The changes that a milter may make to a message (SMFIF)."""

    ADDHDRS = 0x1
    CHGBODY = 0x2
    ADDRCPT = 0x4
    DELRCPT = 0x8
    CHGHDRS = 0x10
    QUARANTINE = 0x20
    CHGFROM = 0x40
    ADDRCPT_PAR = 0x80
    SETSYMLIST = 0x100


class Protocol(IntFlag):
    """Options of the MTA (SMFIP).

    NO: it does not send the command. NR: it does not wait for the reply to the command.
    """

    NO_CONNECT = 0x1
    NO_HELO = 0x2
    NO_MAIL = 0x4
    NO_RCPT = 0x8
    NO_BODY = 0x10
    NO_HEADER = 0x20
    NO_EOH = 0x40
    NR_HEADER = 0x80
    NO_UNKNOWN = 0x100
    NO_DATA = 0x200
    SKIP = 0x400
    RCPT_REJ = 0x800
    NR_CONNECT = 0x1000
    NR_HELO = 0x2000
    NR_MAIL = 0x4000
    NR_RCPT = 0x8000
    NR_DATA = 0x10000
    NR_UNKNOWN = 0x20000
    NR_EOH = 0x40000
    NR_BODY = 0x80000
    HDR_LEADSPC = 0x100000
    MDS_256K = 0x10000000
    MDS_1M = 0x20000000
    # Used in manifests only, never on the wire to an MTA: the milter gives no verdict at end of
    # message. The MTA sends that command and waits for its reply whatever was negotiated.
    NR_EOM = 0x80000000


NO_ACTIONS = Actions(0)
NO_PROTOCOL = Protocol(0)


class Stage(Enum):
    """A command that a milter can answer; the value is its letter on the wire."""

    __hash__ = object.__hash__  # each member exists once; Enum's own hash is a Python call

    CONNECT = b"C"
    HELO = b"H"
    MAIL = b"M"
    RCPT = b"R"
    DATA = b"T"
    HEADER = b"L"
    EOH = b"N"
    BODY = b"B"
    EOM = b"E"
    UNKNOWN = b"U"

    @property
    def code(self) -> int:
        """The letter as an integer, as a packet's index returns it."""
        return self.value[0]

    @property
    def word(self) -> str:
        """The stage's name for authors and logs: `connect`, `eom`."""
        return self.name.lower()

    @property
    def suppress(self) -> Protocol:
        """The bit with which the MTA does not send the command; 0 for end of message."""
        return Protocol.__members__.get(f"NO_{self.name}", NO_PROTOCOL)

    @property
    def no_reply(self) -> Protocol:
        """The bit with which the MTA does not wait for a reply; NR_EOM is never sent to it."""
        return Protocol.__members__.get(f"NR_{self.name}", NO_PROTOCOL)

    @property
    def symlist(self) -> int | None:
        """The stage's number in a SETSYMLIST; None if its macros cannot be chosen.

        End of message has a lower number than end of headers, unlike their order on the wire.
        """
        return SYMLIST_NUMBERS.get(self)


SYMLIST_NUMBERS = {
    Stage.CONNECT: 0,
    Stage.HELO: 1,
    Stage.MAIL: 2,
    Stage.RCPT: 3,
    Stage.DATA: 4,
    Stage.EOM: 5,
    Stage.EOH: 6,
}

SYMLIST_STAGES = {number: stage for stage, number in SYMLIST_NUMBERS.items()}

STAGES = {stage.code: stage for stage in Stage}
