"""Addresses: every spelling of a listening socket."""

from __future__ import annotations

import socket

import pytest

from sharded_milter.errors import UsageError
from sharded_milter.mta.addresses import ListenAddress, parse_listen

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.mark.parametrize(
    ("spec", "host", "port", "family"),
    [
        ("inet:8890@127.0.0.1", "127.0.0.1", 8890, V4),
        ("inet:8890@mail.example", "mail.example", 8890, V4),
        ("inet:8890", "", 8890, V4),
        ("inet6:8890@::1", "::1", 8890, V6),
        ("inet6:8890@[::1]", "::1", 8890, V6),
        ("inet6:8890@localhost", "localhost", 8890, V6),
        ("inet6:8890", "::", 8890, V6),
        ("inet:8890@::1", "::1", 8890, V6),
        ("inet:127.0.0.1:8890", "127.0.0.1", 8890, V4),
        ("inet:localhost:8890", "localhost", 8890, V4),
        ("inet:[::1]:8890", "::1", 8890, V6),
        ("inet6:[::1]:8890", "::1", 8890, V6),
        ("inet:[127.0.0.1]:8890", "127.0.0.1", 8890, V4),
        ("tcp:8890", "", 8890, V4),
        ("tcp:port=8890", "", 8890, V4),
        ("tcp:8890:interface=127.0.0.1", "127.0.0.1", 8890, V4),
        ("tcp6:8890", "::", 8890, V6),
        (r"tcp6:8890:interface=\:\:1", "::1", 8890, V6),
        ("inet:0@127.0.0.1", "127.0.0.1", 0, V4),
        ("inet:65535@127.0.0.1", "127.0.0.1", 65535, V4),
    ],
)
def test_a_port_is_spelled_in_many_ways(spec: str, host: str, port: int, family: int) -> None:
    assert parse_listen(spec) == ListenAddress(spec, host=host, port=port, family=family)


@pytest.mark.parametrize("prefix", ["unix:", "local:", ""])
@pytest.mark.parametrize("path", ["/run/x.sock", "/with space/x:y@z"])
def test_a_path_is_spelled_in_three_ways(prefix: str, path: str) -> None:
    assert parse_listen(prefix + path) == ListenAddress(prefix + path, path=path)


@pytest.mark.parametrize(
    "spec",
    ["", "inet:", "inet:x", "inet:@127.0.0.1", "inet:8890@", "inet:a@b", "inet::8890", "8890",
     "inet:127.0.0.1", "inet:127.0.0.1:", "inet:-1@127.0.0.1", "inet:::1:8890", "inet7:1@a",
     "unix:", "unix:relative", "relative", "tcp:", "tcp:x", "tcp:1:interface=", "pigeon:coo",
     "unix", "inet:1@a@b", "inet:[]:1", "inet:٣@127.0.0.1:"],
)  # fmt: skip
def test_anything_else_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match="is neither inet:PORT@HOST nor"):
        parse_listen(spec)


@pytest.mark.parametrize("spec", ["inet:65536@127.0.0.1", "inet:localhost:99999", "tcp:70000"])
def test_a_port_has_sixteen_bits(spec: str) -> None:
    with pytest.raises(UsageError, match="is above 65535"):
        parse_listen(spec)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("inet:0@127.0.0.1", "inet:127.0.0.1:8890"),
        ("inet:0@mail.example", "inet:mail.example:8890"),
        ("inet:0", "inet:127.0.0.1:8890"),
        ("inet:0@0.0.0.0", "inet:127.0.0.1:8890"),
        ("inet6:0@::1", "inet:[::1]:8890"),
        ("inet6:0", "inet:[::1]:8890"),
        ("unix:/run/x", "unix:/run/x"),
        ("/run/x", "unix:/run/x"),
    ],
)
def test_the_address_is_spelled_for_postfix(spec: str, name: str) -> None:
    assert parse_listen(spec).for_postfix(8890) == name
