"""The peers that may connect: networks for TCP sockets, users and groups for UNIX sockets.

TCP sockets are restricted if a network is named, UNIX sockets if a user or a group is named;
otherwise they are open to all. Every peer that is not named is refused, also root. The kernel
reports a peer's user and groups (SO_PEERCRED, SO_PEERGROUPS). The members of a group are looked up
when the service starts, so that no connection waits for a directory server.
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
    """The peers that may connect."""

    networks: tuple[Network, ...] = ()
    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    members: frozenset[int] = frozenset()  # users who are members of the groups

    @classmethod
    def union(cls, peers: Iterable[Peers]) -> Peers:
        """Return the peers that at least one of them includes."""
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
    def restricts_users(self) -> bool:
        """True if UNIX sockets are restricted."""
        return bool(self.users or self.groups)

    def allows_host(self, host: str) -> bool:
        """Return True if a TCP peer with this address may connect."""
        if not self.networks:
            return True
        address = _address(host)
        return any(address in network for network in self.networks)

    def allows_user(self, user: int, groups: Collection[int]) -> bool:
        """Return True if a process with this user and groups may connect to a UNIX socket."""
        if not self.restricts_users:
            return True
        return user in self.users or user in self.members or not self.groups.isdisjoint(groups)


ALL_PEERS = Peers()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an address; an IPv4-mapped IPv6 address becomes an IPv4 address."""
    address = ipaddress.ip_address(host.partition("%")[0])  # without the interface's name
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def parse_peers(text: str) -> Peers:
    """Parse a comma-separated list. Raise UsageError for a wrong item or an unknown name."""
    return Peers.union(_parse_one(item.strip()) for item in text.split(","))


def _parse_one(item: str) -> Peers:
    kind, colon, name = item.partition(":")
    if colon and kind == "user":
        return Peers(users=frozenset({_number(item, name, accounts.user_id)}))
    if colon and kind == "group":
        group = _number(item, name, accounts.group_id)
        return Peers(groups=frozenset({group}), members=frozenset(_members(group)))
    return Peers((_network(item),))


def _network(item: str) -> Network:
    address, slash, length = item.partition("/")
    bare = address.removeprefix("[").removesuffix("]") + slash + length  # [::1], as in main.cf
    try:
        network = ipaddress.ip_network(bare)
    except ValueError as error:
        with suppress(ValueError):
            wider = ipaddress.ip_network(bare, strict=False)
            raise UsageError(f"{item!r} is an address in a network; that is {wider}") from None
        why = f": {error}" if slash else ""
        raise UsageError(f"{item!r} is not {ACCEPTED}{why}") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= 96:
        return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def _number(item: str, name: str, look_up: Callable[[str], int]) -> int:
    """Return the number of a user or a group. Raise UsageError with the item and the reason."""
    try:
        return look_up(name)
    except ValueError as error:
        raise UsageError(f"{item!r}: {error}") from None


def _members(group: int) -> Iterable[int]:
    """Yield the users that the group database has as members of the group."""
    with suppress(KeyError):
        for name in grp.getgrgid(group).gr_mem:
            with suppress(KeyError):
                yield pwd.getpwnam(name).pw_uid


def open_socket_warning(spec: str, host: str, peers: Peers) -> str:
    """Return a warning if any host may connect to the socket; else an empty string.

    `spec` is the operator's spelling of the socket, `host` its address, empty for a path.
    """
    if not host or peers.networks:
        return ""
    cure = "restrict it with --allowed-peers NETWORK, or listen on a UNIX socket"
    if peers.restricts_users:
        reason = "users and groups in --allowed-peers restrict UNIX sockets only"
        return f"{spec} accepts connections from any host, because {reason}; {cure}"
    if _address(host).is_loopback:
        return ""
    return f"{spec} accepts connections from any host that can reach it; {cure}"


def peer_credentials(sock: socket.socket) -> tuple[int, tuple[int, ...]]:
    """Return user and groups of the process that has connected to a UNIX socket."""
    size = _CREDENTIALS.size
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, group = _CREDENTIALS.unpack(data)
    more = b""
    with suppress(OSError):  # an older kernel, or too many groups
        more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_READ)
    return user, (group, *(number for (number,) in _ID.iter_unpack(more)))


def user_name(user: int) -> str:
    """Return the user's name for log lines."""
    try:
        return f"user {pwd.getpwuid(user).pw_name} (uid {user})"
    except KeyError:
        return f"user with uid {user}"
