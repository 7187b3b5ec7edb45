"""Who may connect: every spelling, and who matches."""

from __future__ import annotations

import grp
import os
import pwd
import socket

import pytest

from sharded_milter.errors import UsageError
from sharded_milter.mta.peers import (
    ACCEPTED,
    ALL_PEERS,
    Peers,
    open_socket_warning,
    parse_peers,
    peer_credentials,
    user_name,
)

ROOT = pwd.getpwuid(0)


@pytest.mark.parametrize(
    ("text", "host", "may"),
    [
        ("127.0.0.0/8", "127.0.0.1", True),
        ("127.0.0.0/8", "127.255.255.255", True),
        ("127.0.0.0/8", "128.0.0.0", False),
        ("127.0.0.0/8", "::1", False),
        ("127.0.0.0/8", "::ffff:127.0.0.1", True),
        ("::1", "::1", True),
        ("::1", "::2", False),
        ("::1", "127.0.0.1", False),
        ("[::1]", "::1", True),
        ("[2001:db8::]/32", "2001:db8:1::1", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.8", False),
        ("192.0.2.7", "::ffff:192.0.2.7", True),
        ("192.0.2.7/32", "192.0.2.7", True),
        ("192.0.2.0/255.255.255.0", "192.0.2.9", True),
        ("::ffff:192.0.2.0/120", "192.0.2.9", True),
        ("::ffff:192.0.2.0/120", "::ffff:192.0.2.9", True),
        ("::ffff:192.0.2.0/120", "192.0.3.9", False),
        ("::/0", "2001:db8::1", True),
        ("::/0", "192.0.2.1", False),
        ("0.0.0.0/0", "192.0.2.1", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("192.0.2.7, 198.51.100.0/24", "198.51.100.200", True),
        ("192.0.2.7,198.51.100.0/24", "198.51.101.0", False),
        ("user:0", "198.51.100.1", True),
    ],
)
def test_a_host_may_connect_if_a_network_has_it(text: str, host: str, may: bool) -> None:
    assert parse_peers(text).allows_host(host) is may


@pytest.mark.parametrize(
    ("peers", "user", "groups", "may"),
    [
        (Peers(users=frozenset({7})), 7, (1,), True),
        (Peers(users=frozenset({7})), 8, (7,), False),
        (Peers(users=frozenset({7})), 0, (0,), False),
        (Peers(groups=frozenset({7})), 8, (7,), True),
        (Peers(groups=frozenset({7})), 8, (1, 7), True),
        (Peers(groups=frozenset({7})), 7, (1, 2), False),
        (Peers(groups=frozenset({7}), members=frozenset({9})), 9, (1,), True),
        (Peers(groups=frozenset({7}), members=frozenset({9})), 8, (9,), False),
        (Peers(users=frozenset({1}), groups=frozenset({7})), 1, (2,), True),
        (Peers(users=frozenset({1}), groups=frozenset({7})), 2, (7,), True),
        (parse_peers("192.0.2.1"), 1, (1,), True),
        (ALL_PEERS, 1, (1,), True),
    ],
)
def test_a_user_may_connect_who_is_named_or_in_a_group_that_is(
    peers: Peers, user: int, groups: tuple[int, ...], may: bool
) -> None:
    assert peers.allows_user(user, groups) is may


def test_names_and_numbers_mean_the_same() -> None:
    assert parse_peers(f"user:{ROOT.pw_name}") == parse_peers("user:0")
    group = grp.getgrgid(0).gr_name
    assert parse_peers(f"group:{group}") == parse_peers("group:0")
    assert parse_peers("user:4294967294").users == {4294967294}
    assert parse_peers("group:4294967294").groups == {4294967294}


def test_the_members_of_a_group_are_those_of_the_group_database(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = grp.struct_group(("mail", "x", 4321, [ROOT.pw_name, "no-such-user"]))
    monkeypatch.setattr(grp, "getgrnam", lambda name: entry)
    monkeypatch.setattr(grp, "getgrgid", lambda number: entry)
    peers = parse_peers("group:mail")
    assert peers == Peers(groups=frozenset({4321}), members=frozenset({0}))


def test_several_lists_are_one() -> None:
    whole = parse_peers("192.0.2.1,user:1,group:4294967294,::1")
    apart = map(parse_peers, ("192.0.2.1", "user:1,group:4294967294", "::1"))
    assert Peers.union(apart) == whole


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", f"'' is not {ACCEPTED}"),
        ("::1,", f"'' is not {ACCEPTED}"),
        ("postfix", f"'postfix' is not {ACCEPTED}"),
        ("localhost", f"'localhost' is not {ACCEPTED}"),
        ("uid:0", f"'uid:0' is not {ACCEPTED}"),
        ("192.0.2", f"'192.0.2' is not {ACCEPTED}"),
        ("192.0.2.0/33", f"'192.0.2.0/33' is not {ACCEPTED}: "),
        ("10.1.2.3/8", "'10.1.2.3/8' is an address in a network; that is 10.0.0.0/8"),
        ("user:no-such-user", "'user:no-such-user': there is no such user"),
        ("group:no-such-group", "'group:no-such-group': there is no such group"),
        ("user:", "'user:': there is no such user"),
        ("user:-1", "'user:-1': there is no such user"),
        ("user:a\0b", "'user:a\\x00b': there is no such user"),
        ("user:4294967295", "'user:4294967295': the highest number is 4294967294"),
        ("192.0.2.1 user:0", f"'192.0.2.1 user:0' is not {ACCEPTED}"),
    ],
)
def test_a_mistake_is_said_with_what_is_accepted(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_peers(text)
    assert str(caught.value).startswith(why)
    assert "\n" not in str(caught.value)


def test_the_kernel_says_who_has_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        user, groups = peer_credentials(ours)
    assert (user, groups[0]) == (os.geteuid(), os.getegid())
    assert set(groups[1:]) == set(os.getgroups())


def test_users_are_called_by_name_where_they_have_one() -> None:
    assert user_name(0) == f"user {ROOT.pw_name} (uid 0)"
    assert user_name(4294967294) == "user with uid 4294967294"


@pytest.mark.parametrize(
    ("host", "peers", "words"),
    [
        ("127.0.0.1", "", ""),
        ("127.8.0.1", "", ""),
        ("::1", "", ""),
        ("::ffff:127.0.0.1", "", ""),
        ("", "", ""),
        ("0.0.0.0", "", "any host"),
        ("::", "", "any host"),
        ("192.0.2.1", "", "any host"),
        ("fe80::1%eth0", "", "any host"),
        ("0.0.0.0", "192.0.2.0/24", ""),
        ("0.0.0.0", "user:0", "restrict UNIX sockets only"),
        ("127.0.0.1", "user:0", "restrict UNIX sockets only"),
        ("127.0.0.1", "user:0,127.0.0.1", ""),
        ("", "192.0.2.0/24", ""),
    ],
)
def test_a_socket_that_all_may_use_is_said_to_be(host: str, peers: str, words: str) -> None:
    line = open_socket_warning("spec", host, parse_peers(peers) if peers else ALL_PEERS)
    assert words in line
    assert ("--allowed-peers" in line) == line.startswith("spec") == bool(words)
