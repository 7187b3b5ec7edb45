"""A place of shards: a process that is started for the shard.

Built on ampoule's starter and connector. The AMP connection runs over one inherited UNIX socket
pair instead of two pipes, so that descriptors can be passed.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ampoule.main import AMPConnector, ProcessStarter
from twisted.internet.error import ProcessExitedAlready
from twisted.python.failure import Failure

from sharded_milter.closing import CLOSING
from sharded_milter.ipc.sockets import read_now
from sharded_milter.pool.descendants import Descendants
from sharded_milter.pool.output import Output
from sharded_milter.pool.places import PlaceOwner
from sharded_milter.transports import PassingTransport

# The worker gets only these variables: others may hold secrets or change its behaviour.
PASSED_ENVIRONMENT = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "PATH",
    "PYTHONPATH",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
)

# Variables that set the number of threads of numerical libraries. By default each library starts
# one thread a CPU in every worker, and there is one worker a CPU already: scikit-learn answered
# 31.7 messages a second that way, and 2,113 with one thread.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")

# Seconds for which a dead worker's output is read on if its descendants hold the pipes open.
OUTPUT_GRACE = 2.0

# Reads of 8 KB from a pipe in one go: it holds 64 KB.
MAX_CATCH_UP = 8

_OUTPUTS = (1, 2)
_CHANNEL = 3
_BOOTSTRAP = (
    "import sys; from sharded_milter.workers.bootstrap import main; main({}, sys.argv[1:], **{!r})"
)


@dataclass(frozen=True)
class WorkerConfig:
    """The options with which every worker is started.

    `specs` are the milters to serve; with `script`, a pymilter script and its arguments. `cpus`
    are assigned to the slots in turn; empty: no affinity. `memory_limit` is in bytes; 0: none.
    `open_files` is the soft limit of descriptors; 0: the master's. `sandbox` has the arguments of
    `Sandbox`. `descendants` kills processes that workers leave running.
    """

    specs: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    nice: int = 0
    memory_limit: int = 0
    cpus: tuple[int, ...] = ()
    script: bool = False
    open_files: int = 0
    sandbox: Mapping[str, Any] = field(default_factory=dict)
    descendants: Descendants | None = None

    def bootstrap(self, slot: int, mark: int = 0) -> str:
        """Return the Python code that the worker of a slot runs."""
        cpus = (self.cpus[(slot - 1) % len(self.cpus)],) if self.cpus else ()
        options = {
            "nice": self.nice,
            "memory_limit": self.memory_limit,
            "cpus": cpus,
            "mark": mark,
            "script": self.script,
            "open_files": self.open_files,
            "sandbox": dict(self.sandbox),
        }
        return _BOOTSTRAP.format(os.getpid(), options)


class Spawned:
    """A process that was started for the shard of one slot."""

    def __init__(self, config: WorkerConfig, slot: int, reactor: Any) -> None:
        self.pid = 0
        self._descendants = config.descendants or Descendants(reactor)
        self._mark = 0  # of the process and its descendants
        self._config = config
        self._slot = slot
        self._reactor = reactor
        self._process: Any = None
        self._connector: Any = None

    def start(self, owner: PlaceOwner, channel: Any) -> None:
        """Start the process and connect `channel` to it; raise OSError when the system refuses."""
        CLOSING.start()
        place = self._config
        self._mark = self._descendants.mark()
        starter = Starter(
            bootstrap=place.bootstrap(self._slot, self._mark),
            args=place.specs,
            env=dict(place.env),
        )
        starter.connectorFactory = lambda protocol: self._connect(protocol, owner)
        try:
            starter.start(channel, self._started, self._reactor)
        except OSError:
            self._descendants.end(self._mark)
            raise

    def _connect(self, channel: Any, owner: PlaceOwner) -> Connector:
        connector = self._connector = Connector(channel, self._slot, owner, self._reactor)
        return connector

    def _started(self, process: Any) -> None:
        self._process, self.pid = process, process.pid

    def read_output(self) -> None:
        """Read the output until now: it belongs to the job that was just answered."""
        self._connector.catch_up()

    def kill(self) -> None:
        """Ends the process and its group at once; its other descendants end when it is gone.

        No descriptor is needed for that, and no look into /proc.
        """
        self._signal(signal.SIGKILL)
        self._end_group()

    def dump_stacks(self) -> None:
        """Make the process write the Python stacks of all its threads."""
        self._signal(signal.SIGUSR1)

    def _signal(self, number: int) -> None:
        with suppress(ProcessExitedAlready):
            self._process.signalProcess(number)

    def is_stopped(self) -> bool:
        """Return whether a signal (SIGSTOP) has stopped it, not a debugger; needs no descriptor."""
        try:
            options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, options) is not None
        except ChildProcessError:
            return False

    def is_traced(self) -> bool:
        """Return whether a debugger or strace is attached to it; False if /proc cannot be read."""
        try:
            with open(f"/proc/{self.pid}/status", "rb") as status:
                tracers = [line.split()[1] for line in status if line.startswith(b"TracerPid:")]
        except OSError:
            return False
        return tracers not in ([], [b"0"])

    def memory(self) -> int:
        """Return the resident memory of the process, bytes; 0 if it cannot be read."""
        import psutil  # here, because workers are started sooner without it

        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except (psutil.Error, OSError):  # it is gone, or no descriptor is left to look
            return 0

    def kill_descendants(self) -> None:
        """Kill what the dead process has left running."""
        self._end_group()
        self._descendants.end(self._mark)

    def _end_group(self) -> None:
        """Kill the process group, which has the process's id."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class Starter(ProcessStarter):  # type: ignore[misc]  # ampoule is not typed
    """Spawns a process with a socket pair, a clean environment, and no module search in the cwd."""

    def start(self, protocol: Any, started: Callable[[Any], None], reactor: Any) -> None:
        """Start a process and connect `protocol` to it; call `started` with its transport.

        Raise OSError when the system refuses.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = reactor.spawnProcess(
                    self.connectorFactory(protocol),
                    sys.executable,
                    [sys.executable, "-P", "-c", self.bootstrap, *self.args],
                    env=self.env,
                    childFDs={0: "w", 1: "r", 2: "r", _CHANNEL: theirs.fileno()},
                )
            except BaseException:
                ours.close()
                raise
        started(process)
        PassingTransport.connect(ours, protocol, reactor)


class Connector(AMPConnector):  # type: ignore[misc]  # ampoule is not typed
    """Handles the process's output and its exit; AMP uses the socket."""

    def __init__(self, protocol: Any, slot: int, owner: PlaceOwner, reactor: Any) -> None:
        super().__init__(protocol, slot)
        self._owner = owner
        self._reactor = reactor
        self._output = Output(owner, self._hold, reactor)

    def connectionMade(self) -> None:
        self.transport.closeStdin()
        self._watch_pipes()

    def childConnectionLost(self, childFD: int) -> None:
        super().childConnectionLost(childFD)
        self._watch_pipes()

    def _watch_pipes(self) -> None:
        """Prepare the poll of the pipes, which is made for every answer."""
        self._written = select.poll()
        for reader in self._readers():
            self._written.register(reader.fileno(), select.POLLIN)

    def catch_up(self) -> None:
        """Read the output until now, in at most MAX_CATCH_UP reads a pipe."""
        if self._written.poll(0) and not self._output.held:
            read_now(self._readers(), MAX_CATCH_UP, lambda: self._output.held)

    def _readers(self) -> list[Any]:
        pipes = getattr(self.transport, "pipes", {})  # Twisted's own, by the child's number
        return [pipes[fd] for fd in _OUTPUTS if fd in pipes]

    def _hold(self, held: bool) -> None:
        for reader in self._readers():
            reader.stopReading() if held else reader.startReading()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._output.feed(childFD, data)

    def processExited(self, reason: Failure) -> None:
        self._output.end()
        self._reactor.callLater(OUTPUT_GRACE, self.transport.loseConnection)
        self._owner.exited(_exit_reason(reason))

    def processEnded(self, reason: Failure) -> None:
        """Do nothing when the pipes are closed too."""


def worker_environment(environ: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's environment: the passed variables of the master's, and `extra`.

    Numerical libraries start one thread, unless the master's environment sets another number.
    """
    kept = {name: environ[name] for name in (*PASSED_ENVIRONMENT, *THREADS) if name in environ}
    return {**dict.fromkeys(THREADS, "1"), **kept, "PYTHONUNBUFFERED": "1", **extra}


def _exit_reason(status: Failure) -> str:
    value = status.value
    number = getattr(value, "signal", None)
    if number:
        hint = ", perhaps out of memory" if number == signal.SIGKILL else ""
        return f"killed by {_signal_name(number)}{hint}"
    return f"exited with code {getattr(value, 'exitCode', 0) or 0}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"
