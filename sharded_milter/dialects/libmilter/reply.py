"""Reply texts by libmilter's rules, for smfi_setreply and smfi_setmlreply."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sharded_milter.errors import CallRefused
from sharded_milter.protocol.replies import MAX_REPLY_LINES
from sharded_milter.protocol.text import to_wire

# libmilter's limit on the bytes of a line of a reply (MAXREPLYLEN).
MAX_LINE = 980

_RCODE = re.compile(r"[45]\d\d", re.ASCII)
_XCODE = re.compile(r"[45]\.\d{1,3}\.\d{1,3}", re.ASCII)


def reply_lines(call: str, rcode: str, xcode: str | None, lines: Sequence[str | None]) -> str:
    """Return the text of a REPLYCODE packet.

    `rcode` is 4dd or 5dd, `xcode` an enhanced code of the same class or None. There are at most
    MAX_REPLY_LINES lines; each has at most MAX_LINE bytes and no line break, or is None for no
    text. Single percent signs are doubled. If an MTA needs an enhanced code and none is given, it
    is x.0.0. Raise CallRefused, which names `call`, for all other arguments.
    """
    if not isinstance(rcode, str) or not _RCODE.fullmatch(rcode):
        raise CallRefused(f"{call}: reply code {rcode!r:.40} is neither 4dd nor 5dd")
    if xcode and (not isinstance(xcode, str) or not _XCODE.fullmatch(xcode)):
        raise CallRefused(f"{call}: enhanced code {xcode!r:.40} is neither 4.d.d nor 5.d.d")
    if xcode and xcode[0] != rcode[0]:
        raise CallRefused(f"{call}: enhanced code {xcode} does not belong to reply code {rcode}")
    if not 1 <= len(lines) <= MAX_REPLY_LINES:
        raise CallRefused(f"{call}: a reply has 1 to {MAX_REPLY_LINES} lines, not {len(lines)}")
    texts = [_checked(call, line) for line in lines]
    if not xcode and (len(texts) > 1 or _looks_like_a_class(texts[0] or "", rcode)):
        xcode = f"{rcode[0]}.0.0"
    xcode = xcode or None
    words = [" ".join(word for word in (xcode, text) if word is not None) for text in texts]
    separators = ["-"] * (len(words) - 1) + [" "]
    return "\r\n".join(
        f"{rcode}{separator}{text}" for separator, text in zip(separators, words, strict=True)
    )


def _looks_like_a_class(text: str, rcode: str) -> bool:
    """Return True if Postfix would read the text as an enhanced code of another class."""
    return text[:1].isdigit() and text[0] != rcode[0]


def _checked(call: str, line: str | None) -> str | None:
    if line is None:
        return None
    if not isinstance(line, str):
        raise CallRefused(f"{call}: {line!r:.80} is not a str")
    if re.search("[\r\n\0]", line):
        raise CallRefused(f"{call}: {line[:80]!r} has a line break or a NUL")
    try:
        size = len(to_wire(line))
    except UnicodeEncodeError:
        raise CallRefused(f"{call}: {line[:80]!r} cannot be encoded as UTF-8") from None
    if size > MAX_LINE:
        raise CallRefused(f"{call}: a line of {size} bytes exceeds the limit of {MAX_LINE}")
    return re.sub("%%?", "%%", line)
