"""Who may connect: networks for TCP sockets, users and groups for UNIX sockets.

A kind of socket is restricted if something of its kind is named, and open to all otherwise. Whoever
is not named is refused, root included. A peer's user and groups are those that the kernel says
(SO_PEERCRED, SO_PEERGROUPS); the members of a group are looked up when the service starts, so that
no connection waits for a directory server.
"""

from __future__ import annotations

import grp
import ipaddress
import pwd
import socket
import struct
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sharded_milter import accounts
from sharded_milter.errors import UsageError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ACCEPTED = "a network (192.0.2.0/24, ::1), user:NAME or group:NAME"

_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group
_ID = struct.Struct("I")
_SO_PEERGROUPS = 59  # Linux; not in Python's socket
_GROUPS_READ = 1024  # bytes: 256 groups, Python's limit


@dataclass(frozen=True)
class Peers:
    """Who may connect."""

    networks: tuple[Network, ...] = ()
    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    members: frozenset[int] = frozenset()  # users who are members of the groups

    @classmethod
    def all_of(cls, peers: Iterable[Peers]) -> Peers:
        """Whoever one of them names."""
        found = cls()
        for each in peers:
            found = cls(
                (*found.networks, *each.networks),
                found.users | each.users,
                found.groups | each.groups,
                found.members | each.members,
            )
        return found

    @property
    def names_users(self) -> bool:
        """Whether UNIX sockets are restricted."""
        return bool(self.users or self.groups)

    def take_host(self, host: str) -> bool:
        """Whether a TCP peer with this address may connect."""
        if not self.networks:
            return True
        address = _address(host)
        return any(address in network for network in self.networks)

    def take_user(self, user: int, groups: Collection[int]) -> bool:
        """Whether a process of this user with these groups may connect to a UNIX socket."""
        if not self.names_users:
            return True
        return user in self.users or user in self.members or not self.groups.isdisjoint(groups)


ANYBODY = Peers()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of an IPv4 host that comes by IPv6 is an IPv4 address."""
    address = ipaddress.ip_address(host.partition("%")[0])  # without the interface's name
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def parse_peers(text: str) -> Peers:
    """Whom `text` names, between commas; UsageError where it is wrong, or there is none such."""
    return Peers.all_of(_parsed(piece.strip()) for piece in text.split(","))


def _parsed(piece: str) -> Peers:
    kind, colon, name = piece.partition(":")
    if colon and kind == "user":
        return Peers(users=frozenset({_number(piece, name, accounts.user_id)}))
    if colon and kind == "group":
        group = _number(piece, name, accounts.group_id)
        return Peers(groups=frozenset({group}), members=frozenset(_members(group)))
    return Peers((_network(piece),))


def _network(piece: str) -> Network:
    address, slash, length = piece.partition("/")
    bare = address.removeprefix("[").removesuffix("]") + slash + length  # [::1], as in main.cf
    try:
        network = ipaddress.ip_network(bare)
    except ValueError as error:
        with suppress(ValueError):
            wider = ipaddress.ip_network(bare, strict=False)
            raise UsageError(f"{piece!r} is an address in a network; that is {wider}") from None
        why = f": {error}" if slash else ""
        raise UsageError(f"{piece!r} is not {ACCEPTED}{why}") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= 96:
        return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def _number(piece: str, name: str, look_up: Callable[[str], int]) -> int:
    """Return the number of a user or a group; UsageError names the piece."""
    try:
        return look_up(name)
    except ValueError as error:
        raise UsageError(f"{piece!r}: {error}") from None


def _members(group: int) -> Iterable[int]:
    """The users that the group database names as members."""
    with suppress(KeyError):
        for name in grp.getgrgid(group).gr_mem:
            with suppress(KeyError):
                yield pwd.getpwnam(name).pw_uid


def unrestricted(spec: str, host: str, peers: Peers) -> str:
    """What an operator must know of a socket that all may use; empty where all is well.

    `spec` is how the operator has spelled it, `host` the address it is bound to, empty for a path.
    """
    if not host or peers.networks:
        return ""
    cure = "say who may with --allowed-peers NETWORK, or listen on a UNIX socket"
    if peers.names_users:
        kind = "users and groups are for UNIX sockets"
        return f"{spec} takes connections of anybody, for {kind} only: {cure}"
    if _address(host).is_loopback:
        return ""
    return f"{spec} takes connections of any host that reaches it: {cure}"


def credentials(sock: Any) -> tuple[int, tuple[int, ...]]:
    """The user and the groups of the process that has connected to a UNIX socket."""
    size = _CREDENTIALS.size
    said = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, group = _CREDENTIALS.unpack(said)
    more = b""
    with suppress(OSError):  # an older kernel, or there are more
        more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_READ)
    return user, (group, *(number for (number,) in _ID.iter_unpack(more)))


def user_name(user: int) -> str:
    """What log lines call a user."""
    try:
        return f"user {pwd.getpwuid(user).pw_name} (uid {user})"
    except KeyError:
        return f"user with uid {user}"
