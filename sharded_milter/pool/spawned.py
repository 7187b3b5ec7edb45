"""A place of shards: a process of its own, which is started for it.

It says how the process is started, what it writes, and that it has ended.

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

from sharded_milter.ipc.sockets import read_now
from sharded_milter.pool.descendants import Descendants
from sharded_milter.pool.output import Output
from sharded_milter.pool.places import Owner
from sharded_milter.transports import PassingTransport

# The worker must not find the operator's secrets in its environment, nor be steered by it.
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

# How many threads numerical libraries start, by the variable that says so. Each would start one for
# every CPU in every worker, of which there is one for every CPU already: scikit-learn answered 31.7
# messages a second so, and 2,113 with one thread.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")

# Output of a dead worker that its descendants still hold open is read for this long.
OUTPUT_GRACE = 2.0

# Reads of 8 KB from a pipe before other work goes on: it holds 64 KB.
MAX_CATCH_UP = 8

_OUTPUTS = (1, 2)
_CHANNEL = 3
_BOOTSTRAP = (
    "import sys; from sharded_milter.workers.bootstrap import main; main({}, sys.argv[1:], **{!r})"
)


@dataclass(frozen=True)
class Workplace:
    """How every worker is started: the milters that it serves and what it may use.

    With `script` they are a pymilter script and its arguments. `cpus` are dealt out, one for each
    slot in turn; none leaves the workers where they like. `open_files` is their soft limit of
    descriptors, 0 leaves it as the master's is. `sandbox` are the arguments of their `Sandbox`.
    `descendants` ends what workers leave.
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
        """The program that Python runs in the worker of a slot."""
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

    def __init__(self, workplace: Workplace, slot: int, reactor: Any) -> None:
        self.pid = 0
        self._descendants = workplace.descendants or Descendants(reactor)
        self._mark = 0  # of the process and all that descends from it
        self._workplace = workplace
        self._slot = slot
        self._reactor = reactor
        self._process: Any = None
        self._connector: Any = None

    def start(self, owner: Owner, channel: Any) -> None:
        """Starts the process, to which the master speaks `channel`.

        Raises OSError when the system refuses.
        """
        place = self._workplace
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

    def _connect(self, channel: Any, owner: Owner) -> Connector:
        connector = self._connector = Connector(channel, self._slot, owner, self._reactor)
        return connector

    def _started(self, process: Any) -> None:
        self._process, self.pid = process, process.pid

    def read_output(self) -> None:
        """Takes what was written until now: it belongs to the job that was answered just now."""
        self._connector.catch_up()

    def kill(self) -> None:
        """Ends the process and its group at once; its other descendants end when it is gone.

        No descriptor is needed for that, and no look into /proc.
        """
        self._signal(signal.SIGKILL)
        self._end_group()

    def stacks(self) -> None:
        """Has the process write the Python stacks of all its threads."""
        self._signal(signal.SIGUSR1)

    def _signal(self, number: int) -> None:
        with suppress(ProcessExitedAlready):
            self._process.signalProcess(number)

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it (SIGSTOP); needs no descriptor.

        One that a debugger has stopped is none that this is true of.
        """
        try:
            options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, options) is not None
        except ChildProcessError:
            return False

    def is_traced(self) -> bool:
        """Whether a debugger or strace is attached to it; False where that cannot be known."""
        try:
            with open(f"/proc/{self.pid}/status", "rb") as status:
                tracers = [line.split()[1] for line in status if line.startswith(b"TracerPid:")]
        except OSError:
            return False
        return tracers not in ([], [b"0"])

    def memory(self) -> int:
        """The bytes of memory that the process has resident; 0 when that cannot be known."""
        import psutil  # here, because workers are started sooner without it

        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except (psutil.Error, OSError):  # it is gone, or no descriptor is left to look
            return 0

    def end_family(self) -> None:
        """Ends what the dead process has left running."""
        self._end_group()
        self._descendants.end(self._mark)

    def _end_group(self) -> None:
        """Ends the process group, which bears the process id."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class Starter(ProcessStarter):  # type: ignore[misc]  # ampoule is not typed
    """Spawns with a socket pair, a clean environment, and no module search in the cwd."""

    def start(self, protocol: Any, started: Callable[[Any], None], reactor: Any) -> None:
        """Starts a process, to which the master speaks `protocol`; `started` gets its transport.

        Raises OSError when the system refuses.
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
    """The process's own side: its output and its exit. AMP rides on the socket."""

    def __init__(self, protocol: Any, slot: int, owner: Owner, reactor: Any) -> None:
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
        """Prepare the question whether anything is written: it is asked for every answer."""
        self._written = select.poll()
        for reader in self._readers():
            self._written.register(reader.fileno(), select.POLLIN)

    def catch_up(self) -> None:
        """Takes what was written so far: it belongs to the job that was answered just now."""
        if self._written.poll(0) and not self._output.held:
            read_now(self._readers(), MAX_CATCH_UP)

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
        """Comes when the pipes are closed too; nobody waits for that."""


def worker_environment(environ: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """What a worker finds in its environment: an allow-list of the master's, and `extra`.

    Numerical libraries start one thread, unless the master's environment has another number.
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
