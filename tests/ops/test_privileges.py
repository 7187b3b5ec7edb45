"""The user of the service: refused options, and switching to it."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_milter.errors import ConfigError, NotPermitted, SystemRefused, UsageError
from sharded_milter.ops.privileges import (
    Account,
    account,
    become,
    check,
    check_folder,
)

NOBODY = pwd.getpwnam("nobody")
SOMEBODY = Account("somebody", 1234, 1235, (1235, 7), "/home/somebody")
UNUSED = 3_000_000_001  # above every number that distributions give out


# Names and numbers


def test_no_user_is_no_account() -> None:
    assert account("", "") is None


@pytest.mark.parametrize("user", ["nobody", str(NOBODY.pw_uid)])
def test_a_user_has_its_own_groups(user: str) -> None:
    found = account(user, "")
    assert found is not None
    assert (found.name, found.uid, found.gid) == ("nobody", NOBODY.pw_uid, NOBODY.pw_gid)
    assert set(found.groups) == set(os.getgrouplist("nobody", NOBODY.pw_gid))
    assert found.home == NOBODY.pw_dir


@pytest.mark.parametrize("by_name", [True, False])
def test_a_group_may_be_another_one(by_name: bool) -> None:
    group = next(each for each in grp.getgrall() if each.gr_gid != NOBODY.pw_gid)
    found = account("nobody", group.gr_name if by_name else str(group.gr_gid))
    assert found is not None
    assert found.gid == group.gr_gid
    assert group.gr_gid in found.groups


def test_a_number_without_an_entry_needs_a_group() -> None:
    assert account(str(UNUSED), "7") == Account(str(UNUSED), UNUSED, 7, (7,), "/")
    with pytest.raises(ConfigError, match=f"--user {UNUSED}: the user database has no entry for"):
        account(str(UNUSED), "")


@pytest.mark.parametrize(
    ("user", "group", "kind", "why"),
    [
        ("no-such", "", ConfigError, "--user 'no-such': there is no such user"),
        ("nobody", "no-such", ConfigError, "--group 'no-such': there is no such group"),
        ("-1", "", ConfigError, "--user '-1': there is no such user"),
        ("4294967295", "", ConfigError, "--user '4294967295': the highest number is 4294967294"),
        ("nobody", "99999999999", ConfigError, "--group '99999999999': the highest number is"),
        ("", "mail", UsageError, "--group mail needs --user, which is not given"),
    ],
)
def test_what_there_is_not_is_named(user: str, group: str, kind: type[Exception], why: str) -> None:
    with pytest.raises(kind, match=why):
        account(user, group)


# What is refused


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def as_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY.uid)
    monkeypatch.setattr(os, "getegid", lambda: SOMEBODY.gid)


@pytest.mark.usefixtures("as_root")
def test_root_runs_what_reads_hostile_mail_only_if_it_must() -> None:
    with pytest.raises(NotPermitted) as caught:
        check(None, "the content scanner", allow_root=False)
    assert str(caught.value) == (
        "the content scanner does not run as root, because it reads hostile mail; give --user NAME,"
        " or --allow-root to run it as root"
    )
    with pytest.raises(NotPermitted):
        check(Account("root", 0, 0, (0,), "/root"), "the content scanner", allow_root=False)
    check(SOMEBODY, "the content scanner", allow_root=False)
    check(None, "the content scanner", allow_root=True)
    check(None, "", allow_root=False)


@pytest.mark.usefixtures("as_somebody")
def test_only_root_becomes_somebody_else() -> None:
    check(None, "the content scanner", allow_root=False)
    check(SOMEBODY, "the content scanner", allow_root=False)
    become(SOMEBODY)
    other = Account("other", 5, 5, (5,), "/")
    with pytest.raises(NotPermitted, match="cannot become --user other: start the service as root"):
        check(other, "", allow_root=False)


# The way there


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """The system calls, recorded; switching back to root fails."""
    made: list[tuple[str, object]] = []

    def setresuid(*uids: int) -> None:
        if 0 in uids:
            raise PermissionError
        made.append(("users", uids))

    monkeypatch.setattr(os, "setgroups", lambda groups: made.append(("groups", groups)))
    monkeypatch.setattr(os, "setresgid", lambda *gids: made.append(("group", gids)))
    monkeypatch.setattr(os, "setresuid", setresuid)
    monkeypatch.setattr(os, "getresuid", lambda: (SOMEBODY.uid,) * 3)
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "root")
    return made


@pytest.mark.usefixtures("as_root")
def test_groups_go_before_the_user_who_could_not_change_them(
    calls: list[tuple[str, object]],
) -> None:
    become(SOMEBODY)
    assert calls == [("groups", (1235, 7)), ("group", (1235,) * 3), ("users", (1234,) * 3)]
    assert (os.environ["HOME"], os.environ["USER"]) == ("/home/somebody", "somebody")
    assert os.environ["LOGNAME"] == "somebody"


@pytest.mark.usefixtures("as_root", "calls")
@pytest.mark.parametrize("way", ["saved", "effective"])
def test_a_way_back_to_root_ends_the_start(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "saved":
        monkeypatch.setattr(os, "getresuid", lambda: (SOMEBODY.uid, SOMEBODY.uid, 0))
    else:
        monkeypatch.setattr(os, "setresuid", lambda *uids: None)
    with pytest.raises(SystemRefused, match="--user somebody: the process could become root"):
        become(SOMEBODY)


@pytest.mark.usefixtures("as_root", "calls")
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EPERM, NotPermitted), (errno.EAGAIN, SystemRefused)]
)
def test_a_refusal_of_the_system_ends_the_start(
    number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(groups: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "setgroups", refuse)
    with pytest.raises(kind, match=f"cannot become --user somebody: {os.strerror(number)}"):
        become(SOMEBODY)


@pytest.mark.usefixtures("as_root", "calls")
def test_a_user_who_cannot_run_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(NotPermitted, match="somebody cannot run /no/python, as its workers must"):
        become(SOMEBODY)


@pytest.mark.usefixtures("as_root")
def test_root_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(os, "setgroups", lambda groups: None)
    monkeypatch.setattr(os, "setresgid", lambda *gids: None)
    monkeypatch.setattr(os, "setresuid", lambda *uids: asked.append(uids))
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "x")
    become(Account("root", 0, 0, (0,), "/root"))
    assert asked == [(0, 0, 0)]


SCRIPT = """
import os, sys
from sharded_milter.ops.privileges import account, become, check_folder
sys.executable = "/bin/sh"
os.setgroups([0, 4])
become(account("nobody", ""))
print(os.getresuid(), os.getresgid(), sorted(os.getgroups()))
for attempt in (lambda: os.setuid(0), lambda: os.seteuid(0), lambda: os.setgid(0),
                lambda: os.setgroups([0]), lambda: open("/etc/shadow")):
    try:
        attempt()
        print("regained")
    except PermissionError:
        pass
check_folder("--keep-dir", "/")
"""


def test_what_was_given_up_is_not_regained() -> None:
    if os.geteuid() != 0:
        assert not os.environ.get("CI"), "CI runs as root"
        pytest.skip("only root can become somebody else")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    uid, gid = NOBODY.pw_uid, NOBODY.pw_gid
    assert done.stdout == f"{(uid,) * 3} {(gid,) * 3} {[gid]}\n"
    assert done.stderr.endswith("NotPermitted: --keep-dir /: user nobody cannot write to it\n")


def test_a_folder_is_asked_for_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder("--keep-dir", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: UNUSED)
    with pytest.raises(NotPermitted, match=f"/none: user {UNUSED} cannot write to it"):
        check_folder("--keep-dir", f"{tmp_path}/none")
