"""Users and groups by name and by number."""

from __future__ import annotations

import grp
import pwd

import pytest

from sharded_milter import accounts

NOBODY = pwd.getpwnam("nobody")
GROUP = grp.getgrgid(NOBODY.pw_gid)
UNUSED = "3000000001"  # above every number that distributions assign

TOO_HIGH = ["4294967295", "99999999999", "9" * 5000]


def test_names_and_numbers_mean_the_same() -> None:
    for user in ("nobody", str(NOBODY.pw_uid), f"000{NOBODY.pw_uid}"):
        assert accounts.user_id(user) == NOBODY.pw_uid
        assert accounts.user_entry(user) == NOBODY
    for group in (GROUP.gr_name, str(GROUP.gr_gid)):
        assert accounts.group_id(group) == GROUP.gr_gid


def test_a_number_needs_no_entry() -> None:
    assert accounts.user_id(UNUSED) == accounts.group_id(UNUSED) == int(UNUSED)
    assert accounts.user_entry(UNUSED) is None
    assert accounts.user_name(int(UNUSED)) == UNUSED
    assert accounts.user_name(NOBODY.pw_uid) == "nobody"


def test_the_highest_number_is_accepted_and_zero_is_a_number() -> None:
    assert accounts.number(str(accounts.HIGHEST_ID)) == accounts.HIGHEST_ID
    assert accounts.number("0") == accounts.number("0" * 5000) == 0


@pytest.mark.parametrize("text", TOO_HIGH)
def test_a_higher_number_is_refused(text: str) -> None:
    for look_up in (accounts.user_id, accounts.user_entry, accounts.group_id):
        with pytest.raises(ValueError, match=r"^the highest number is 4294967294$"):
            look_up(text)


@pytest.mark.parametrize("name", ["no-such", "", "-1", "a\0b", "²", "\udcff"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^there is no such user$"):
        accounts.user_id(name)
    with pytest.raises(ValueError, match=r"^there is no such user$"):
        accounts.user_entry(name)
    with pytest.raises(ValueError, match=r"^there is no such group$"):
        accounts.group_id(name)
