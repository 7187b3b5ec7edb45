"""A worker shuts itself in: what it has imported stays usable, and nothing else of the machine is.

| part         | what it does                                                             |
|--------------|--------------------------------------------------------------------------|
| limits       | descriptors, size of files, processes; no core dump                      |
| no new       | set-user-id programs give it nothing                                     |
| privileges   |                                                                          |
| Landlock     | only named files can be opened; no signals or abstract sockets to others |
| seccomp      | only named system calls                                                  |

It is entered once the milters are imported, before the master hears that they are, and there is
no way out. `auto` is for processes whose milters have all opted in, goes on without a part that
the machine does not have, and says so; `on` is for every process and fails then.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..dialects.loader import Dialect, file_of
from ..errors import MilterLoadError
from ..prctl import set_no_new_privileges
from . import landlock, seccomp
from .landlock import Right
from .readable import NETWORK, readable
from .refusals import hint

# What is often enough for one process (ulimit -n of a user); the master's own limit is far higher.
MAX_DESCRIPTORS = 1024

# Anonymous memory is a file, too. No answer is larger: messages have 100 MB by default.
MAX_FILE = 1024 * 1024 * 1024

_NULL = "/dev/null"


class Report(NamedTuple):
    """What became of it, in a sentence for the log; empty where nothing is to be said.

    `incomplete` where something is not as it should be; `entered` where the process is shut in.
    """

    text: str = ""
    incomplete: bool = False
    entered: bool = False


@dataclass(frozen=True)
class Sandbox:
    """How the workers are to be shut in, in the operator's words (`--sandbox...`).

    `hidden` are files and folders that are never readable by default. `max_abi` is for tests: the
    highest version of Landlock that is used.
    """

    mode: str = "off"
    read: Sequence[str] = ()
    write: Sequence[str] = ()
    allow: Sequence[str] = ()
    hidden: Sequence[str] = ()
    max_abi: int | None = None

    def enter(self, milters: Sequence[Dialect], specs: Sequence[str]) -> Report:
        """Shuts this process in, if it is to be; raises MilterLoadError where it must and cannot.

        The milters were made of `specs`.
        """
        if self.mode == "off":
            return Report()
        others = [milter.manifest.name for milter in milters if not milter.sandbox]
        if self.mode == "auto" and others:
            return Report(
                f"workers are not sandboxed: {', '.join(others)} has not opted in"
                " (sandbox = True); --sandbox on is for every milter"
            )
        restrict_resources()
        set_no_new_privileges()
        version = landlock.abi(self.max_abi)
        lacks_files = self._restrict_files(version, specs)
        # Where Landlock does not have all of the process, seccomp must do without it.
        lacks_calls = self._restrict_calls(0 if lacks_files else version)
        missing = list(filter(None, (lacks_files, lacks_calls)))
        if missing and self.mode == "on":
            raise MilterLoadError(
                f"--sandbox on, but there is no {' and no '.join(missing)}; --sandbox auto goes on"
                " without"
            )
        if missing:
            return Report(f"workers are sandboxed without {' and '.join(missing)}", True, True)
        return Report(f"workers are sandboxed, with Landlock {version}", entered=True)

    def _restrict_files(self, version: int, specs: Sequence[str]) -> str:
        """Enters Landlock; returns what is missing."""
        if not version:
            return "Landlock (the kernel has none; it came with Linux 5.13)"
        threads = _other_threads() if version < landlock.ALL_THREADS_SINCE else 0
        try:
            landlock.restrict(self._paths(specs), version, network=self._may("network"))
        except OSError as error:
            return f"Landlock ({error.strerror})"
        if threads:
            return (
                f"Landlock in {threads} threads that a milter has started when it was imported"
                " (start them at the first message)"
            )
        return ""

    def _restrict_calls(self, version: int) -> str:
        """Enters seccomp, and nothing else can be entered then; returns what is missing."""
        try:
            seccomp.restrict(seccomp.library(), self._rules(version))
        except seccomp.Unavailable as error:
            return f"seccomp ({error})"
        return ""

    def hint(self, error: BaseException) -> str:
        """Which option would allow what was refused to a process that is shut in.

        Empty where the sandbox is not to blame.
        """
        return hint(error, self.allow)

    def _may(self, what: str) -> bool:
        return what in self.allow

    def _paths(self, specs: Sequence[str]) -> Mapping[str, Right]:
        reading = landlock.RUN if self._may("subprocess") else landlock.READ
        network = NETWORK if self._may("network") else ()
        files = [file_of(spec) for spec in specs]
        found = dict.fromkeys((*readable(files, self.hidden), *network, *self.read), reading)
        found[_NULL] = Right.READ_FILE | Right.WRITE_FILE
        return {**found, **dict.fromkeys(self.write, landlock.WRITE)}

    def _rules(self, version: int) -> Sequence[seccomp.Rule]:
        return seccomp.rules(
            network=self._may("network"),
            subprocess=self._may("subprocess"),
            writes=bool(self.write),
            files_restricted=bool(version),
            signals_scoped=version >= landlock.SCOPES_SINCE,
        )


NO_SANDBOX = Sandbox()


def restrict_resources() -> None:
    """No core dump, which would hold mail, and a bound on what a process can fill.

    It may have half of the user's processes and threads, so that the master, which has the same
    user, can still start others.
    """
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    for limit, wanted in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
        (resource.RLIMIT_FSIZE, MAX_FILE),
        (resource.RLIMIT_NPROC, processes // 2 if processes > 0 else processes),
    ):
        _, most = resource.getrlimit(limit)
        bounds = [each for each in (wanted, most) if each != resource.RLIM_INFINITY]
        if bounds:
            resource.setrlimit(limit, (min(bounds), min(bounds)))


def _other_threads() -> int:
    """Threads of this process besides this one."""
    try:
        return len(os.listdir("/proc/self/task")) - 1
    except OSError:  # a container without /proc
        return 0
