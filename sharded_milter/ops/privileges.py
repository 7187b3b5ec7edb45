"""The user that the service runs as: root may bind the sockets, another user reads the mail.

Mail is hostile, and code that it injects into a worker has the worker's rights. So a service that
was started as root switches to --user once its sockets are bound and its log is open: master and
workers, and for ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sharded_milter import accounts
from sharded_milter.errors import ConfigError, NotPermitted, SystemRefused, UsageError

ROOT = 0

REMEDY = "give --user NAME"

T = TypeVar("T")


@dataclass(frozen=True)
class Account:
    """A user and its groups, from the system's databases."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]  # with gid
    home: str


def account(user: str, group: str) -> Account | None:
    """Return the account of --user and --group (names or numbers); None without --user.

    Without --group it has the user's own group. Raise ConfigError if there is no such user or
    group, UsageError for --group without --user.
    """
    if not user:
        if group:
            raise UsageError(f"--group {group} needs --user, which is not given")
        return None
    entry = _found("--user", user, accounts.user_entry)
    if entry is None:
        if not group:
            raise ConfigError(
                f"--user {user}: the user database has no entry for this number; give --group too"
            )
        gid = _found("--group", group, accounts.group_id)
        return Account(user, accounts.user_id(user), gid, (gid,), "/")
    gid = _found("--group", group, accounts.group_id) if group else entry.pw_gid
    groups = tuple(os.getgrouplist(entry.pw_name, gid))
    return Account(entry.pw_name, entry.pw_uid, gid, groups, entry.pw_dir)


def _found(option: str, text: str, look_up: Callable[[str], T]) -> T:
    """Return what `look_up` finds for the value of an option; ConfigError names both."""
    try:
        return look_up(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: {error}") from None


def check(wanted: Account | None, refused: str, *, allow_root: bool) -> None:
    """Raise NotPermitted if the service cannot switch to `wanted`, or must not run as root.

    `refused` names the milter that must not run as root unless `allow_root`; "" if there is none.
    """
    now = os.geteuid()
    if wanted is not None and now != ROOT and not _is_current(wanted):
        raise NotPermitted(
            f"cannot become --user {wanted.name}: start the service as root, or as that user and"
            " group without these options"
        )
    uid = now if wanted is None else wanted.uid
    if uid == ROOT and refused and not allow_root:
        raise NotPermitted(
            f"{refused} does not run as root, because it reads hostile mail; {REMEDY}, or"
            " --allow-root to run it as root"
        )


def _is_current(wanted: Account) -> bool:
    """Return True if this process already runs as that account."""
    return (os.geteuid(), os.getegid()) == (wanted.uid, wanted.gid)


def become(wanted: Account) -> None:
    """Switch this process to `wanted` for ever; processes that it starts inherit that.

    Raise NotPermitted or SystemRefused; then the process must end.
    """
    if os.geteuid() != ROOT:
        return  # it is the account already, or `check` had raised
    uid, gid = wanted.uid, wanted.gid
    try:
        os.setgroups(wanted.groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except PermissionError as error:  # a container's root without the capability
        raise NotPermitted(f"cannot become --user {wanted.name}: {error.strerror}") from None
    except OSError as error:
        raise SystemRefused(f"cannot become --user {wanted.name}: {error.strerror}") from None
    if uid != ROOT and _can_regain_root():
        raise SystemRefused(f"--user {wanted.name}: the process could become root again")
    os.environ.update(HOME=wanted.home, USER=wanted.name, LOGNAME=wanted.name)
    if not os.access(sys.executable, os.X_OK, effective_ids=True):
        raise NotPermitted(f"--user {wanted.name} cannot run {sys.executable}, as its workers must")


def _can_regain_root() -> bool:
    try:
        os.setresuid(-1, ROOT, -1)
    except PermissionError:
        return ROOT in os.getresuid()
    return True


def check_folder(option: str, path: str) -> None:
    """Raise NotPermitted if this process cannot create files in the directory `path`."""
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        user = accounts.user_name(os.geteuid())
        raise NotPermitted(f"{option} {path}: user {user} cannot write to it")
