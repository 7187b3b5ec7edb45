"""Verdicts, and the actions of an `Accept` at end of message.

All are values: tests can compare them. A constructor raises InvalidValue, which names the value,
if it cannot be sent to an MTA.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sharded_milter.errors import InvalidValue
from sharded_milter.protocol.text import to_wire

# RFC 5322 3.6.8: printable US-ASCII except the colon. The length is RFC 5322's line limit.
_HEADER_NAME = re.compile(r"[!-9;-~]{1,998}")

# RFC 3463: class, subject, detail; libmilter takes up to three digits each.
_XCODE = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}")

# Bytes of a text. A reply is one packet of at most 65,535 bytes, which a header's value shares with
# its name, its index and two NULs.
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
        raise InvalidValue(f"{what} {text[:80]!r} cannot be encoded as UTF-8") from None
    if size > MAX_TEXT:
        raise InvalidValue(f"{what} has {size} bytes; at most {MAX_TEXT} can be sent")


def _check_header(name: str, value: str) -> None:
    _check_text("header name", name)
    if not _HEADER_NAME.fullmatch(name):
        raise InvalidValue(f"header name {name[:80]!r} is not 1 to 998 visible ASCII characters")
    _check_text(f"value of header {name}", value)
    for line in re.split("\r\n|\r|\n", value)[1:]:
        if line[:1] not in (" ", "\t"):
            raise InvalidValue(
                f"value {value[:80]!r} of header {name}: a continuation line must start with a"
                " space or tab"
            )


def _check_address(what: str, address: str, esmtp: tuple[str, ...] = ()) -> None:
    _check_text(what, address, forbidden="\0\r\n")
    if not isinstance(esmtp, tuple):
        raise InvalidValue(
            f"ESMTP parameters of {what} {address[:80]!r} must be a tuple, not {esmtp!r:.80}"
        )
    for parameter in esmtp:
        _check_text("ESMTP parameter", parameter, forbidden="\0\r\n \t")
        if not parameter:
            raise InvalidValue(f"an ESMTP parameter of {what} {address[:80]!r} is empty")
    _check_text(f"{what} with its ESMTP parameters", " ".join((address, *esmtp)))


def _check_index(index: int, lowest: int) -> None:
    if not isinstance(index, int) or not lowest <= index <= 0x7FFFFFFF:
        raise InvalidValue(f"header index {index!r} is not between {lowest} and 2147483647")


@dataclass(frozen=True, slots=True)
class AddHeader:
    """Add a field at the end of the header (smfi_addheader)."""

    name: str
    value: str

    def __post_init__(self) -> None:
        _check_header(self.name, self.value)


@dataclass(frozen=True, slots=True)
class InsertHeader:
    """Insert a field at `index` (smfi_insheader); 0 is before all other fields.

    An index other than 0 does not mean the same place in Postfix and in Sendmail.
    """

    index: int
    name: str
    value: str

    def __post_init__(self) -> None:
        _check_index(self.index, 0)
        _check_header(self.name, self.value)


@dataclass(frozen=True, slots=True)
class ChangeHeader:
    """Change the value of the `index`-th field called `name`, from 1 (smfi_chgheader).

    If there is no such field, one is added at the end.
    """

    name: str
    index: int
    value: str

    def __post_init__(self) -> None:
        _check_index(self.index, 1)
        _check_header(self.name, self.value)
        if not self.value:
            raise InvalidValue(f"an empty value would delete header {self.name}; use DeleteHeader")


@dataclass(frozen=True, slots=True)
class DeleteHeader:
    """Delete the `index`-th field called `name`, from 1 (smfi_chgheader).

    The index counts in the header that the milter got, also if other fields are deleted.
    """

    name: str
    index: int = 1

    def __post_init__(self) -> None:
        _check_index(self.index, 1)
        _check_header(self.name, "")


@dataclass(frozen=True, slots=True)
class AddRecipient:
    """Add a recipient (smfi_addrcpt, smfi_addrcpt_par); `esmtp` such as `("NOTIFY=NEVER",)`."""

    address: str
    esmtp: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_address("recipient", self.address, self.esmtp)
        if not self.address:
            raise InvalidValue("recipient '' is empty")


@dataclass(frozen=True, slots=True)
class DeleteRecipient:
    """Delete a recipient (smfi_delrcpt); `address` in the client's spelling, brackets optional."""

    address: str

    def __post_init__(self) -> None:
        _check_address("recipient", self.address)
        if not self.address:
            raise InvalidValue("recipient '' is empty")


@dataclass(frozen=True, slots=True)
class ChangeSender:
    """Change the envelope sender (smfi_chgfrom); `""` is the null sender."""

    address: str
    esmtp: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_address("sender", self.address, self.esmtp)


@dataclass(frozen=True, slots=True)
class ReplaceBody:
    """Replace the whole body (smfi_replacebody); its line ends must be CRLF."""

    body: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.body, bytes):
            raise InvalidValue(f"body must be bytes, not {type(self.body).__name__}")


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Hold the message for an administrator (smfi_quarantine)."""

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
        raise InvalidValue(
            f"reply code {code!r} is not between {first_digit}00 and {first_digit}99"
        )
    _check_text("enhanced code", xcode)
    if not _XCODE.fullmatch(xcode) or xcode[0] != str(first_digit):
        raise InvalidValue(f"enhanced code {xcode!r} is not of the form {first_digit}.x.x")


@dataclass(frozen=True, init=False)
class Accept:
    """Accept without further callbacks. At end of message, `actions` are applied in their order."""

    actions: tuple[Action, ...]

    def __init__(self, *actions: Action) -> None:
        for action in actions:
            if not isinstance(action, Action):
                raise InvalidValue(f"Accept takes actions, not {action!r:.80}")
        if sum(isinstance(action, ReplaceBody) for action in actions) > 1:
            raise InvalidValue("Accept takes one ReplaceBody, with the whole new body")
        object.__setattr__(self, "actions", actions)


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse permanently: `550 5.7.1 text`. Line breaks in `text` make a multi-line reply."""

    text: str
    code: int = 550
    xcode: str = "5.7.1"

    def __post_init__(self) -> None:
        _check_refusal(self.text, self.code, self.xcode, 5)


@dataclass(frozen=True, slots=True)
class TempFail:
    """Refuse temporarily: `451 4.7.1 text`; code 421 also closes the client's connection."""

    text: str
    code: int = 451
    xcode: str = "4.7.1"

    def __post_init__(self) -> None:
        _check_refusal(self.text, self.code, self.xcode, 4)


@dataclass(frozen=True, slots=True)
class Discard:
    """Accept the message from the client, but do not deliver it."""


Verdict = Accept | Reject | TempFail | Discard | None
