"""The value that rules are matched against: one decoded part of a message."""

import re
from dataclasses import dataclass
from enum import StrEnum

from .limits import MAX_NAME

# C0 and C1 control characters. A name is logged and matched as one line of text.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Mark(StrEnum):
    """Facts about a part besides its data. Each is a Boolean variable in every rule."""

    ENCRYPTED = "encrypted"  # an archive with a member that needs a password
    BOMB = "bomb"  # an archive that reached a limit and was not opened to its end
    BROKEN = "broken"  # an archive that could not be read to its end
    FLOODED = "flooded"  # a message with more MIME entities, or deeper ones, than the limits
    TIMED_OUT = "timed_out"  # something was not matched in time


@dataclass(frozen=True, slots=True)
class Part:
    """One decoded part: the message, a MIME leaf, an archive, its member; or marks without data.

    `depth` is the number of archives that it is in.
    """

    name: str
    content_type: str
    data: bytes
    depth: int = 0
    marks: frozenset[Mark] = frozenset()


def plain_name(name: str) -> str:
    """Return the end of a file name, without control characters and lone surrogates."""
    text = _CONTROLS.sub("", name[-MAX_NAME:])
    return text.encode("utf-8", "replace").decode("utf-8")
