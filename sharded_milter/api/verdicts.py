"""What a milter answers: verdicts, and the actions that an `Accept` at end of message carries.

All are values: they cross a process border, and comparing them is the test. A constructor
refuses what the wire cannot carry and names it (InvalidValue).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sharded_milter.errors import InvalidValue
from sharded_milter.protocol.text import to_wire

# RFC 5322 3.6.8: printable US-ASCII without the colon. The length is RFC 5322's line limit.
_HEADER_NAME = re.compile(r"[!-9;-~]{1,998}")

# RFC 3463: class, subject, detail; libmilter takes up to three digits each.
_XCODE = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}")

# A reply is one packet of at most 65,535 bytes: a header's name and index, and two NULs, must fit
# in beside its value.
MAX_TEXT = 64_000


def _check_text(what: str, text: str, *, forbidden: str = "\0") -> None:
    if not isinstance(text, str):
        raise InvalidValue(f"{what} must be str, not {type(text).__name__}")
    for character in forbidden:
        if character in text:
            raise InvalidValue(f"{what} {text[:80]!r} contains {character!r}")
    try:
        size = len(to_wire(text))
    except UnicodeEncodeError:
        raise InvalidValue(f"{what} {text[:80]!r} is not text that can be encoded") from None
    if size > MAX_TEXT:
        raise InvalidValue(f"{what} of {size} bytes exceeds {MAX_TEXT}")


def _check_header(name: str, value: str) -> None:
    _check_text("header name", name)
    if not _HEADER_NAME.fullmatch(name):
        raise InvalidValue(f"header name {name[:80]!r} is not 1 to 998 visible ASCII characters")
    _check_text(f"value of header {name}", value)
    for line in re.split("\r\n|\r|\n", value)[1:]:
        if line[:1] not in (" ", "\t"):
            raise InvalidValue(
                f"value {value[:80]!r} of header {name} breaks the line without a blank behind"
            )


def _check_address(what: str, address: str, esmtp: tuple[str, ...] = ()) -> None:
    _check_text(what, address, forbidden="\0\r\n")
    if not isinstance(esmtp, tuple):
        raise InvalidValue(
            f"ESMTP parameters of {what} {address[:80]!r} are not a tuple: {esmtp!r:.80}"
        )
    for parameter in esmtp:
        _check_text("ESMTP parameter", parameter, forbidden="\0\r\n \t")
        if not parameter:
            raise InvalidValue(f"an ESMTP parameter of {what} {address[:80]!r} is empty")
    _check_text(f"{what} with its ESMTP parameters", " ".join((address, *esmtp)))


def _check_index(index: int, lowest: int) -> None:
    if not isinstance(index, int) or not lowest <= index <= 0x7FFFFFFF:
        raise InvalidValue(f"header index {index!r} is not within {lowest} and 2147483647")


@dataclass(frozen=True, slots=True)
class AddHeader:
    """A new field at the end of the header (smfi_addheader)."""

    name: str
    value: str

    def __post_init__(self) -> None:
        _check_header(self.name, self.value)


@dataclass(frozen=True, slots=True)
class InsertHeader:
    """A new field at `index` (smfi_insheader); 0 is the top, above all other fields.

    Indexes but 0 do not mean the same place to Postfix and to Sendmail.
    """

    index: int
    name: str
    value: str

    def __post_init__(self) -> None:
        _check_index(self.index, 0)
        _check_header(self.name, self.value)


@dataclass(frozen=True, slots=True)
class ChangeHeader:
    """A new value for the `index`-th field called `name`, counted from 1 (smfi_chgheader).

    Where there is none it is added.
    """

    name: str
    index: int
    value: str

    def __post_init__(self) -> None:
        _check_index(self.index, 1)
        _check_header(self.name, self.value)
        if not self.value:
            raise InvalidValue(f"an empty value deletes header {self.name}: use DeleteHeader")


@dataclass(frozen=True, slots=True)
class DeleteHeader:
    """The `index`-th field called `name` as the milter saw it, counted from 1, is removed."""

    name: str
    index: int = 1

    def __post_init__(self) -> None:
        _check_index(self.index, 1)
        _check_header(self.name, "")


@dataclass(frozen=True, slots=True)
class AddRecipient:
    """A further recipient (smfi_addrcpt, smfi_addrcpt_par); `esmtp` like `("NOTIFY=NEVER",)`."""

    address: str
    esmtp: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_address("recipient", self.address, self.esmtp)
        if not self.address:
            raise InvalidValue("recipient '' is empty")


@dataclass(frozen=True, slots=True)
class DeleteRecipient:
    """One recipient less (smfi_delrcpt); `address` as the client wrote it, brackets or not."""

    address: str

    def __post_init__(self) -> None:
        _check_address("recipient", self.address)
        if not self.address:
            raise InvalidValue("recipient '' is empty")


@dataclass(frozen=True, slots=True)
class ChangeSender:
    """Another envelope sender (smfi_chgfrom); `""` is the null sender."""

    address: str
    esmtp: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_address("sender", self.address, self.esmtp)


@dataclass(frozen=True, slots=True)
class ReplaceBody:
    """Another body (smfi_replacebody), all of it, line ends CRLF."""

    body: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.body, bytes):
            raise InvalidValue(f"body must be bytes, not {type(self.body).__name__}")


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The message is held for an operator (smfi_quarantine)."""

    reason: str

    def __post_init__(self) -> None:
        _check_text("quarantine reason", self.reason, forbidden="\0\r\n")
        if not self.reason:
            raise InvalidValue("quarantine reason '' is empty")


Action = (
    AddHeader
    | InsertHeader
    | ChangeHeader
    | DeleteHeader
    | AddRecipient
    | DeleteRecipient
    | ChangeSender
    | ReplaceBody
    | Quarantine
)


def _check_refusal(text: str, code: int, xcode: str, first_digit: int) -> None:
    _check_text("reply text", text)
    if not isinstance(code, int) or not first_digit * 100 <= code <= first_digit * 100 + 99:
        raise InvalidValue(f"reply code {code!r} is not within {first_digit}00 and {first_digit}99")
    _check_text("enhanced code", xcode)
    if not _XCODE.fullmatch(xcode) or xcode[0] != str(first_digit):
        raise InvalidValue(f"enhanced code {xcode!r} is not of the form {first_digit}.x.x")


@dataclass(frozen=True, init=False)
class Accept:
    """Enough seen: let it pass. At end of message it carries actions, applied in their order."""

    actions: tuple[Action, ...]

    def __init__(self, *actions: Action) -> None:
        for action in actions:
            if not isinstance(action, Action):
                raise InvalidValue(f"Accept takes actions, not {action!r}")
        if sum(isinstance(action, ReplaceBody) for action in actions) > 1:
            raise InvalidValue("Accept takes one ReplaceBody: it is all of the new body")
        object.__setattr__(self, "actions", actions)


@dataclass(frozen=True, slots=True)
class Reject:
    """A permanent refusal: `550 5.7.1 text`. Line breaks in `text` make a multi-line reply."""

    text: str
    code: int = 550
    xcode: str = "5.7.1"

    def __post_init__(self) -> None:
        _check_refusal(self.text, self.code, self.xcode, 5)


@dataclass(frozen=True, slots=True)
class TempFail:
    """A temporary refusal: `451 4.7.1 text`; code 421 also ends the client's connection."""

    text: str
    code: int = 451
    xcode: str = "4.7.1"

    def __post_init__(self) -> None:
        _check_refusal(self.text, self.code, self.xcode, 4)


@dataclass(frozen=True, slots=True)
class Discard:
    """Say yes to the client and deliver nothing."""


Verdict = Accept | Reject | TempFail | Discard | None
