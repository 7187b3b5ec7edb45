"""Users and groups of the system, looked up by name or by number.

Every function raises ValueError where it finds nothing; its text is the reason, for a message
that names the option.
"""

from __future__ import annotations

import grp
import pwd

# The highest number that a user or a group can have. Linux takes the next one as "no change".
HIGHEST_ID = 0xFFFF_FFFE


def number(text: str) -> int | None:
    """Return the number that `text` is, or None for a name.

    Raise ValueError for a number above HIGHEST_ID.
    """
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(HIGHEST_ID)) or int(digits) > HIGHEST_ID:
        raise ValueError(f"the highest number is {HIGHEST_ID}")
    return int(digits)


def user_entry(user: str) -> pwd.struct_passwd | None:
    """Return the entry of a user; None for a number that has no entry.

    Raise ValueError for a name that has no entry.
    """
    uid = number(user)
    try:
        return pwd.getpwnam(user) if uid is None else pwd.getpwuid(uid)
    except (KeyError, ValueError):  # ValueError: the name has a NUL or no encoding
        if uid is None:
            raise ValueError("there is no such user") from None
        return None


def user_id(user: str) -> int:
    """Return the number of a user. A number needs no entry."""
    uid = number(user)
    if uid is not None:
        return uid
    entry = user_entry(user)
    assert entry is not None  # it is a name
    return entry.pw_uid


def group_id(group: str) -> int:
    """Return the number of a group. A number needs no entry."""
    gid = number(group)
    if gid is not None:
        return gid
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise ValueError("there is no such group") from None


def user_name(uid: int) -> str:
    """Return the name of a user; its number, as text, where it has no entry."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
