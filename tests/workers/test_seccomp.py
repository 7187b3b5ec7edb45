"""The filter: what it is made of, and what is said where it cannot be made."""

from __future__ import annotations

import errno
import os
import platform
import socket
import subprocess
import sys
from typing import Any

import pytest
from kernel import required

from sharded_milter.workers import seccomp
from sharded_milter.workers.seccomp import ALWAYS, Rule, Unavailable, equal, rules


def names(**changes: bool) -> set[str]:
    return {rule.call for rule in made(**changes)}


def made(**changes: bool) -> list[Rule]:
    flags = dict.fromkeys(
        ("network", "subprocess", "writes", "files_restricted", "signals_scoped"), False
    )
    return rules(**(flags | changes))


def holds(rule: Rule, *arguments: int) -> bool:
    """Whether the kernel would allow the call with these arguments."""
    return all(
        arguments[each.arg] == each.a
        if each.op == seccomp._EQUAL
        else arguments[each.arg] & each.a == each.b
        for each in rule.comparisons
    )


def allowed(call: str, *arguments: int, **changes: bool) -> bool:
    return any(holds(rule, *arguments) for rule in made(**changes) if rule.call == call)


def test_pairs_of_sockets_only_where_a_milter_has_a_use_for_them() -> None:
    unix, stream = socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC
    assert not allowed("socketpair", unix, stream)
    for use in ("network", "subprocess"):
        assert allowed("socketpair", unix, stream, **{use: True})
        assert not allowed("socketpair", unix, socket.SOCK_DGRAM, **{use: True})


def test_no_call_is_named_twice() -> None:
    assert len(set(ALWAYS)) == len(ALWAYS)
    assert set(ALWAYS).isdisjoint(names(network=True, subprocess=True, writes=True))


@pytest.mark.parametrize(("call", "before"), [("open", (0,)), ("openat", (0, 0))])
@pytest.mark.parametrize(
    ("flags", "restricted", "free"),
    [
        (os.O_RDONLY | os.O_CLOEXEC, True, True),
        (os.O_RDONLY | os.O_CREAT, True, False),
        (os.O_WRONLY, True, False),
        (os.O_RDWR | os.O_CREAT | os.O_TRUNC, True, False),
        (os.O_RDONLY | os.O_TRUNC, False, False),
        (os.O_ACCMODE, False, False),
    ],
)
def test_opening(
    call: str, before: tuple[int, ...], flags: int, restricted: bool, free: bool
) -> None:
    """Landlock decides about writing, but did not know truncating before its third version."""
    assert allowed(call, *before, flags, files_restricted=True) is restricted
    assert allowed(call, *before, flags, writes=True) is restricted
    assert allowed(call, *before, flags) is free


def test_clone_makes_threads_and_never_namespaces_or_siblings() -> None:
    thread = 0x3D0F00  # as the C library asks for one
    assert allowed("clone", thread)
    assert not allowed("clone", 17)
    assert allowed("clone", 17, subprocess=True)
    for more in (
        0x8000,
        0x20000,
        0x2000000,
        0x4000000,
        0x8000000,
        0x10000000,
        0x20000000,
        0x40000000,
    ):
        assert not allowed("clone", thread | more)
        assert not allowed("clone", 17 | more, subprocess=True)


def test_signals_go_to_itself_alone_unless_landlock_scopes_them() -> None:
    for call in ("kill", "tgkill"):
        assert allowed(call, os.getpid(), 9, 9)
        assert not allowed(call, os.getppid(), 9, 9, signals_scoped=True)
        assert not allowed(call, os.getppid(), 9, 9, subprocess=True)
        assert allowed(call, os.getppid(), 9, 9, subprocess=True, signals_scoped=True)


def test_the_library_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "LIBRARY", "libnothing.so.9")
    with pytest.raises(Unavailable, match=r"libnothing\.so\.9 is not installed \(Debian: libsec"):
        seccomp.library()


def test_an_architecture_whose_calls_are_not_known_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(Unavailable, match="no filter for s390x, only for x86_64 and aarch64"):
        seccomp.library()


class Library:
    """Fails where it is told to."""

    def __init__(self, **results: int) -> None:
        self.results = results
        self.released = False

    def seccomp_init(self, _: int) -> int:
        return self.results.get("init", 1)

    def seccomp_attr_set(self, *_: Any) -> int:
        return 0

    def seccomp_syscall_resolve_name(self, name: bytes) -> int:
        return self.results.get(name.decode(), 1)

    def seccomp_rule_add_array(self, *_: Any) -> int:
        return self.results.get("add", 0)

    def seccomp_load(self, _: int) -> int:
        return self.results.get("load", 0)

    def seccomp_release(self, _: int) -> None:
        self.released = True


@pytest.mark.parametrize(
    ("results", "why"),
    [
        ({"init": 0}, "libseccomp makes no filter"),
        ({"add": -errno.EINVAL}, "libseccomp refuses the rule for clone3: Invalid argument"),
        ({"load": -errno.EINVAL}, "the kernel takes no filter: Invalid argument"),
    ],
)
def test_what_fails_is_said(results: dict[str, int], why: str) -> None:
    library = Library(**results)
    with pytest.raises(Unavailable, match=why):
        seccomp.restrict(library, [])
    assert library.released == ("init" not in results)


def test_a_call_that_the_library_does_not_know_is_left_out() -> None:
    library = Library(clone3=-1, openat2=-1, fchmodat2=-1)
    seccomp.restrict(library, [Rule("fcntl", (equal(1, 1),))])
    assert library.released


def test_calls_of_other_architectures_are_left_out() -> None:
    """Their names have numbers below -1 here, as `open` has on aarch64."""
    required()
    code = (
        "from sharded_milter.workers.seccomp import *; found = library();"
        "assert found.seccomp_syscall_resolve_name(b'arm_fadvise64_64') < -1;"
        "restrict(found, [Rule('arm_fadvise64_64')]); print('restricted')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "restricted\n"
