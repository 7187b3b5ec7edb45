"""The sandbox of a worker: after its imports it can use almost nothing else of the machine.

| part         | what it does                                                             |
|--------------|--------------------------------------------------------------------------|
| limits       | descriptors, size of files, processes; no core dump                      |
| no new       | set-user-id programs give it nothing                                     |
| privileges   |                                                                          |
| Landlock     | only named files can be opened; no signals or abstract sockets to others |
| seccomp      | only named system calls                                                  |

A worker enters it after the milters are imported and before it sends Ready, and cannot leave it.
`auto` applies if all milters of the worker have opted in; it continues without a part that the
machine does not have, and logs that. `on` applies to every worker and fails if a part is missing.
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

# Descriptors: a user's common limit (ulimit -n); the master's own limit is far higher.
MAX_DESCRIPTORS = 1024

# Bytes of a file or of anonymous memory. Answers are smaller: messages have 100 MB by default.
MAX_FILE = 1024 * 1024 * 1024

_NULL = "/dev/null"


class Report(NamedTuple):
    """The state of the sandbox, as a sentence for the log; empty if there is nothing to log.

    `incomplete`: a part of the sandbox is missing; `entered`: the process is sandboxed.
    """

    text: str = ""
    incomplete: bool = False
    entered: bool = False


@dataclass(frozen=True)
class Sandbox:
    """The sandbox options (`--sandbox...`).

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
        """Enter the sandbox if the mode applies; raise MilterLoadError if `on` cannot be met.

        `milters` were loaded from `specs`.
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
        # If Landlock does not restrict the whole process, seccomp must not rely on it.
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
        """Enter Landlock; return the part that is missing, for the log, or an empty string."""
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
        """Enter seccomp, which must come last; return what is missing, or an empty string."""
        try:
            seccomp.restrict(seccomp.library(), self._rules(version))
        except seccomp.Unavailable as error:
            return f"seccomp ({error})"
        return ""

    def hint(self, error: BaseException) -> str:
        """Return a line that names the option which would allow a refused operation.

        Empty if the sandbox is not the cause.
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
    """Forbid core dumps, which would contain mail, and limit files, descriptors and processes.

    The limit is half of the user's processes and threads, so that the master, which runs as the
    same user, can still start others.
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
    """Return the number of other threads of this process."""
    try:
        return len(os.listdir("/proc/self/task")) - 1
    except OSError:  # a container without /proc
        return 0
