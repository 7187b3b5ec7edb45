"""Which user the service runs as: root may bind its sockets, another user reads the mail.

Mail is hostile, and what it takes over in a worker has the worker's rights. So a service that was
started as root becomes --user once its sockets are bound and its log is open; master and workers
alike, and for good.
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

REMEDY = "say --user NAME"

T = TypeVar("T")


@dataclass(frozen=True)
class Account:
    """A user with its groups, as the system knows it."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]  # all of them
    home: str


def account(user: str, group: str) -> Account | None:
    """The account of --user and --group, by name or number; None where no user is named.

    Without a group it is the user's own. Raises ConfigError for one that there is not, and
    UsageError for a group without a user.
    """
    if not user:
        if group:
            raise UsageError(f"--group {group} is for --user, which is not given")
        return None
    entry = _found("--user", user, accounts.user_entry)
    if entry is None:
        if not group:
            raise ConfigError(f"--user {user}: that number has no entry; say --group too")
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
    """Raises NotPermitted where the service could not become `wanted`, or should not stay root.

    `refused` is what must not run as root unless `allow_root`; empty for nothing.
    """
    now = os.geteuid()
    if wanted is not None and now != ROOT and not _is_current(wanted):
        raise NotPermitted(
            f"cannot become --user {wanted.name}: start as root, or as that user and group without"
            " these options"
        )
    uid = now if wanted is None else wanted.uid
    if uid == ROOT and refused and not allow_root:
        raise NotPermitted(
            f"{refused} does not run as root, because it reads hostile mail; {REMEDY}, or"
            " --allow-root if it must"
        )


def _is_current(wanted: Account) -> bool:
    """Whether this process runs as that account already."""
    return (os.geteuid(), os.getegid()) == (wanted.uid, wanted.gid)


def become(wanted: Account) -> None:
    """Makes this process, and what it starts from now on, run as `wanted` for good.

    Raises NotPermitted or SystemRefused; the process must not go on then.
    """
    if os.geteuid() != ROOT:
        return  # `check` has seen that it is the account already
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
        raise SystemRefused(f"--user {wanted.name} could become root again")
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
    """Raises NotPermitted where the process, as it is now, cannot make files in a directory."""
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        user = accounts.user_name(os.geteuid())
        raise NotPermitted(f"{option} {path}: user {user} cannot write there")
