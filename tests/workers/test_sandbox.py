"""Whether a process is shut in, what is said of it, and what keeps a worker from starting."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import pytest

from sharded_milter import Milter
from sharded_milter.dialects.functions.dialect import FunctionDialect
from sharded_milter.errors import MilterLoadError
from sharded_milter.workers import landlock, sandbox, seccomp
from sharded_milter.workers.landlock import READ, RUN, WRITE, Right
from sharded_milter.workers.sandbox import MAX_DESCRIPTORS, Report, Sandbox


class Machine:
    """A machine that has everything, and what it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.landlock, self.threads, self.missing = 6, 0, ""
        self.refusal: OSError | None = None  # of Landlock
        self.did: list[str] = []
        self.paths: dict[str, Right] = {}
        self.rules: list[str] = []
        self.opens_for_writing = False
        monkeypatch.setattr(sandbox, "restrict_resources", lambda: self.did.append("limits"))
        monkeypatch.setattr(sandbox, "set_no_new_privileges", lambda: self.did.append("privileges"))
        monkeypatch.setattr(landlock, "abi", lambda most: self.landlock)
        monkeypatch.setattr(landlock, "restrict", self._restrict_files)
        monkeypatch.setattr(seccomp, "library", self._library)
        monkeypatch.setattr(seccomp, "restrict", self._restrict_calls)
        monkeypatch.setattr(sandbox, "_other_threads", lambda: self.threads)

    def _restrict_files(self, paths: dict[str, Right], version: int, *, network: bool) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.did.append(f"landlock {version}" + " with network" * network)
        self.paths = paths

    def _library(self) -> str:
        if self.missing:
            raise seccomp.Unavailable(self.missing)
        return "library"

    def _restrict_calls(self, found: str, rules: Sequence[seccomp.Rule]) -> None:
        self.did.append("seccomp")
        self.opens_for_writing = sum(rule.call == "openat" for rule in rules) > 1
        self.rules = [rule.call for rule in rules if not rule.comparisons]

    def enter(self, *opted_in: bool, **arguments: Any) -> Report:
        dialects = []
        for number, sandboxed in enumerate(opted_in or (True,)):
            milter = Milter(f"m{number}", sandbox=sandboxed)
            milter.eom(lambda message: None)
            dialects.append(FunctionDialect(milter))
        return Sandbox(**arguments).enter(dialects, ["/srv/m/m.py:milter"])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


ALL = ["limits", "privileges", "landlock 6", "seccomp"]


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_all_parts_are_entered_and_seccomp_last(machine: Machine, mode: str) -> None:
    """It would forbid the others."""
    assert machine.enter(mode=mode) == Report(
        "workers are sandboxed, with Landlock 6", entered=True
    )
    assert machine.did == ALL


def test_off_does_nothing_and_says_nothing(machine: Machine) -> None:
    assert machine.enter(mode="off") == Report()
    assert machine.did == []


def test_auto_needs_the_word_of_every_milter(machine: Machine) -> None:
    report = machine.enter(True, False, False, mode="auto")
    assert not report.incomplete
    assert report.text.startswith("workers are not sandboxed: m1, m2 has not opted in")
    assert machine.did == []


def test_on_needs_the_word_of_none(machine: Machine) -> None:
    assert machine.enter(True, False, mode="on").text == "workers are sandboxed, with Landlock 6"
    assert machine.did == ALL


def test_auto_goes_on_without_landlock_and_says_so(machine: Machine) -> None:
    machine.landlock = 0
    report = machine.enter(mode="auto")
    assert report.incomplete
    assert report.text.startswith("workers are sandboxed without Landlock (the kernel has none")
    assert machine.did == ["limits", "privileges", "seccomp"]


def test_auto_goes_on_without_seccomp_and_says_so(machine: Machine) -> None:
    machine.missing = "no library"
    assert machine.enter(mode="auto") == Report(
        "workers are sandboxed without seccomp (no library)", True, True
    )
    assert machine.did == ["limits", "privileges", "landlock 6"]


def test_auto_says_that_threads_of_before_can_read_files(machine: Machine) -> None:
    machine.threads = 3
    report = machine.enter(mode="auto")
    assert report.incomplete
    assert report.text.startswith("workers are sandboxed without Landlock in 3 threads ")
    assert machine.did == ALL
    assert not machine.opens_for_writing, "Landlock does not know what these threads open"


def test_a_kernel_that_restricts_all_threads_asks_for_none(machine: Machine) -> None:
    machine.threads, machine.landlock = 3, landlock.ALL_THREADS_SINCE
    assert not machine.enter(mode="on").incomplete


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"landlock": 0}, "there is no Landlock (the kernel has none"),
        ({"missing": "no library"}, "there is no seccomp (no library); --sandbox auto"),
        ({"threads": 1}, "there is no Landlock in 1 threads"),
        ({"landlock": 0, "missing": "no library"}, "seccomp (no library); --sandbox auto"),
    ],
)
def test_on_does_not_start_without_a_part(
    machine: Machine, change: dict[str, Any], words: str
) -> None:
    vars(machine).update(change)
    with pytest.raises(MilterLoadError, match=r"^--sandbox on, but ") as caught:
        machine.enter(mode="on")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_kernel_that_refuses_a_part_has_none(machine: Machine, mode: str) -> None:
    machine.refusal = OSError(7, "Argument list too long")
    words = "Landlock (Argument list too long) and {}seccomp (no filter)"
    machine.missing = "no filter"
    if mode == "on":
        with pytest.raises(MilterLoadError) as caught:
            machine.enter(mode=mode)
        assert words.format("no ") in str(caught.value)
    else:
        report = machine.enter(mode=mode)
        assert not machine.opens_for_writing
        assert report == Report(f"workers are sandboxed without {words.format('')}", True, True)


def test_the_operators_paths_are_added(machine: Machine) -> None:
    machine.enter(mode="on", read=["/srv/lists"], write=["/var/cache/m"])
    assert machine.paths["/srv/lists"] == READ
    assert machine.paths["/var/cache/m"] == WRITE
    assert machine.paths["/srv/m"] == READ
    assert machine.paths["/dev/null"] == Right.READ_FILE | Right.WRITE_FILE
    assert "/etc/hosts" not in machine.paths
    assert {"unlink", "mkdirat"} <= set(machine.rules)
    assert not {"connect", "execve"} & set(machine.rules)


def test_landlock_decides_what_is_opened_for_writing(machine: Machine) -> None:
    machine.enter(mode="on")
    assert machine.opens_for_writing


def test_network_and_subprocess_are_added(machine: Machine) -> None:
    machine.enter(mode="on", allow=["network", "subprocess"])
    assert machine.did[2] == "landlock 6 with network"
    assert machine.paths["/usr"] == machine.paths["/etc/hosts"] == RUN
    assert {"connect", "execve", "kill"} <= set(machine.rules)
    assert "unlink" not in machine.rules


def test_before_signals_are_scoped_no_child_can_be_killed(machine: Machine) -> None:
    machine.landlock = landlock.SCOPES_SINCE - 1
    machine.enter(mode="on", allow=["subprocess"])
    assert "kill" not in machine.rules


def test_limits_are_lowered_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = resource.RLIM_INFINITY
    before = {
        resource.RLIMIT_CORE: (unlimited, unlimited),
        resource.RLIMIT_NOFILE: (100, 200),
        resource.RLIMIT_FSIZE: (unlimited, unlimited),
        resource.RLIMIT_NPROC: (1000, 4000),
    }
    after: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", before.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", after.__setitem__)
    sandbox.restrict_resources()
    assert after == {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (200, 200),
        resource.RLIMIT_FSIZE: (sandbox.MAX_FILE, sandbox.MAX_FILE),
        resource.RLIMIT_NPROC: (500, 500),
    }
    before[resource.RLIMIT_NOFILE] = (unlimited, unlimited)
    before[resource.RLIMIT_NPROC] = (unlimited, unlimited)
    after.clear()
    sandbox.restrict_resources()
    assert after[resource.RLIMIT_NOFILE] == (MAX_DESCRIPTORS, MAX_DESCRIPTORS)
    assert resource.RLIMIT_NPROC not in after
