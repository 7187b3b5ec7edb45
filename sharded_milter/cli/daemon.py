"""`sharded-milter`: the daemon."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import click

from sharded_milter import __version__, descriptors
from sharded_milter.cli import threads
from sharded_milter.cli.programs import run
from sharded_milter.errors import ConfigError, NotPermitted, UsageError
from sharded_milter.mta.addresses import ListenAddress, parse_listen
from sharded_milter.mta.gate import Admission
from sharded_milter.mta.listener import Listener
from sharded_milter.mta.peers import open_socket_warning
from sharded_milter.ops import config, logs, privileges
from sharded_milter.prctl import hide_memory

if TYPE_CHECKING:  # they import Twisted, which must not delay the report of an operator's mistake
    from twisted.python.failure import Failure

    from sharded_milter.alarms import ReactorTime
    from sharded_milter.dispatch.dispatcher import Dispatcher
    from sharded_milter.mta.accepting import AcceptReactor
    from sharded_milter.mta.members import Member
    from sharded_milter.pool.descendants import Descendants
    from sharded_milter.pool.shard import Shard, ShardOwner

    class DaemonReactor(AcceptReactor, Protocol):
        """Twisted's reactor, as far as it is used here."""

        def run(self) -> None: ...
        def stop(self) -> None: ...
        def callWhenRunning(self, call: Callable[[], object], /) -> object: ...
        def callFromThread(self, call: Callable[[], object], /) -> object: ...
        def callInThread(self, call: Callable[[], object], /) -> None: ...


NAME = "sharded-milter"
SCANNER = "sharded_milter.scanner.milter:milter"
SCANNER_RULES = "SHARDED_MILTER_SCANNER_RULES"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@config.with_options
@click.version_option(__version__, prog_name=NAME)
def daemon(**values: Any) -> int:
    """Serve MILTER to Postfix or Sendmail with one worker process per CPU.

    MILTER is PACKAGE.MODULE:NAME or FILE.py:NAME. With no milter given, the bundled content
    scanner runs. With --pymilter FILE, an existing pymilter script runs, and the arguments are
    passed to the script; put `--` before them.
    Every option is also a key of the --config file and a SHARDED_MILTER_* variable.
    """
    return serve(config.settings_from(values))


def serve(settings: config.Settings) -> int:
    """Run the service until a signal stops it, and return the exit code.

    Raise StartError if it cannot start.
    """
    specs = worker_specs(settings)
    account = privileges.account(settings.user, settings.group)
    privileges.check(account, unfit_for_root(settings, specs), allow_root=settings.allow_root)
    gc.disable()  # until ready: there is almost no garbage, and collecting takes 1/10 of the start
    logs.begin(settings.log_level)
    open_files = descriptors.raise_limit()  # every MTA connection is one
    with contextlib.ExitStack() as stack:

        def bound(address: ListenAddress) -> Listener:
            listener = Listener(address, settings.socket_mode, settings.socket_group)
            stack.callback(listener.close)
            return listener

        listeners = [bound(address) for address in settings.listen]
        switch_user(settings, account)
        shares = descriptors.Shares(settings.workers if specs else 0)
        used = descriptors.in_use()
        warning = descriptors.connections_warning(settings.limits.max_connections, shares, used)

        def bind(wanted: str) -> list[Listener]:
            try:
                return [bound(script_address(wanted))]
            except NotPermitted as error:
                remedy = "; give it with --listen, then root binds it" if account else ""
                raise NotPermitted(f"{error}{remedy}") from None

        return _Run(settings, specs, listeners, bind, shares, open_files, warning).run()


def switch_user(settings: config.Settings, account: privileges.Account | None) -> None:
    """Switch to the user of --user, after everything that only root can open has been opened.

    Raise NotPermitted or SystemRefused.
    """
    if account is not None:
        privileges.become(account)
    if settings.keep_dir:
        privileges.check_folder("--keep-dir", settings.keep_dir)


def unfit_for_root(settings: config.Settings, specs: tuple[str, ...]) -> str:
    """Return the milter that must not run as root; "" if there is none.

    pymilter scripts and the content scanner must not: they read hostile mail.
    """
    if settings.pymilter is not None:
        return f"--pymilter {settings.pymilter}"
    return "the content scanner" if any(map(_is_scanner, (*specs, *settings.in_master))) else ""


def _is_scanner(spec: str) -> bool:
    """Return True if `spec` names the bundled scanner, by its module or by its file."""
    where = spec.rpartition(":")[0]
    folder = Path(__file__).parents[1] / "scanner"
    return where.startswith("sharded_milter.scanner.") or folder in Path(where).resolve().parents


def script_address(wanted: str) -> ListenAddress:
    """Return the socket that a pymilter script asks for; the default if it names none.

    Raise ConfigError if it is malformed.
    """
    if wanted.startswith("fd:"):
        from twisted.logger import Logger

        Logger().warn(
            "the script's socket {wanted} is ignored, {default} is used; choose with --listen",
            wanted=wanted,
            default=config.DEFAULT_LISTEN,
        )
        wanted = ""
    try:
        return parse_listen(wanted or config.DEFAULT_LISTEN)
    except UsageError as error:
        raise ConfigError(f"the script's socket {error}") from None


def worker_specs(settings: config.Settings) -> tuple[str, ...]:
    """Return the milters that the workers load; () if all milters run in the master.

    Raise UsageError if --scanner-rules is given and the content scanner does not run.
    """
    if settings.pymilter is not None:
        specs: tuple[str, ...] = (settings.pymilter, *settings.milters)
    else:
        specs = settings.milters
    if not specs and not settings.in_master:
        specs = (SCANNER,)
    if SCANNER not in specs and settings.scanner_rules:
        names = ", ".join((*settings.in_master, *specs))
        raise UsageError(
            f"--scanner-rules needs the content scanner, but the milters given are {names}"
        )
    return specs


def shard_maker(
    settings: config.Settings,
    specs: tuple[str, ...],
    dispatcher: Dispatcher,
    reactor: ReactorTime,
    open_files: int,
    descendants: Descendants | None = None,
) -> Callable[[int, ShardOwner], Shard]:
    """Return the function with which the pool makes a new shard.

    `open_files` is the workers' limit of file descriptors: the limit before the master raised it.
    """
    from sharded_milter.pool.shard import Shard
    from sharded_milter.pool.spawned import Spawned, WorkerConfig, worker_environment

    extra = {SCANNER_RULES: settings.scanner_rules} if settings.scanner_rules else {}
    worker = WorkerConfig(
        specs,
        worker_environment(os.environ, extra),
        settings.nice,
        settings.worker_memory_limit,
        settings.cpu_affinity,
        settings.pymilter is not None,
        open_files,
        sandbox_of(settings),
        descendants,
    )

    def make(slot: int, owner: ShardOwner) -> Shard:
        place = Spawned(worker, slot, reactor)
        return Shard(slot, place, dispatcher, owner, reactor)

    return make


def sandbox_of(settings: config.Settings) -> dict[str, Any]:
    """Return the arguments of the workers' `Sandbox`."""
    rules = (settings.scanner_rules,) if settings.scanner_rules else ()
    hidden = (settings.keep_dir, config.config_file(), *(each.path for each in settings.listen))
    return {
        "mode": settings.sandbox,
        "read": (*settings.sandbox_read, *map(os.path.abspath, rules)),
        "write": settings.sandbox_write,
        "allow": settings.sandbox_allow,
        "hidden": tuple(map(os.path.abspath, filter(None, hidden))),
    }


def in_master_members(
    settings: config.Settings, reactor: ReactorTime, counters: Counter[str]
) -> list[Member]:
    """Load the milters that run in this process; raise UsageError or MilterLoadError."""
    from sharded_milter.dialects.loader import load
    from sharded_milter.in_master import InMaster
    from sharded_milter.mta.members import Member

    hosts = [
        InMaster(load(spec), settings.limits, reactor, counters) for spec in settings.in_master
    ]
    return [Member(host.manifest, host) for host in hosts]


def install_reactor(*, asyncio: bool) -> DaemonReactor:
    """Install and return Twisted's reactor. Call it late: importing Twisted takes time.

    Milters in this process may use asyncio and TLS, as in a worker. The master uses neither. A
    None entry in `sys.modules` blocks the import of pyOpenSSL, which is optional for Twisted and
    takes an eighth of the time until the workers are started.
    """
    if asyncio:
        from sharded_milter.forks import install_asyncio_reactor

        install_asyncio_reactor()
    else:
        sys.modules.setdefault("OpenSSL", None)  # type: ignore[arg-type]  # typeshed has no None
        from sharded_milter.reactor import install

        install()
    from twisted.internet import reactor

    return cast("DaemonReactor", reactor)


class _Run:
    """One run of the reactor."""

    def __init__(
        self,
        settings: config.Settings,
        specs: tuple[str, ...],
        listeners: list[Listener],
        bind: Callable[[str], list[Listener]],
        shares: descriptors.Shares,
        open_files: int,
        warning: str,
    ) -> None:
        reactor = install_reactor(asyncio=bool(settings.in_master))
        from twisted.logger import Logger

        from sharded_milter.dispatch.dispatcher import Dispatcher
        from sharded_milter.dispatch.keep_dir import KeepDir
        from sharded_milter.dispatch.policy import Policy
        from sharded_milter.pool.descendants import Descendants
        from sharded_milter.pool.pool import Pool
        from sharded_milter.server import Server

        # Twisted uses the wall clock, which an administrator may set while a deadline runs.
        reactor.seconds = time.monotonic  # type: ignore[method-assign]
        limits = settings.limits
        keep = None
        if settings.keep_dir:
            keep = KeepDir(Path(settings.keep_dir), settings.keep_quota, reactor.callInThread)
        dispatcher = Dispatcher(limits, reactor, keep)
        self._descendants = Descendants(reactor, shares=bool(settings.in_master))
        make_shard = shard_maker(
            settings, specs, dispatcher, reactor, open_files, self._descendants
        )
        workers = settings.workers if specs else 0
        pool = Pool(make_shard, workers, limits, dispatcher, reactor)
        in_master = in_master_members(settings, reactor, dispatcher.counters)
        policy = Policy(settings.on_error, settings.on_poison)
        self._settings = settings
        self._warning = warning
        self._reactor = reactor
        self._log = Logger()
        self._workers = workers
        self._server = Server(
            listeners,
            pool,
            dispatcher,
            limits,
            policy,
            reactor,
            in_master,
            bind,
            message_log=logs.message_log(),
            admission=Admission(settings.allowed_peers, shares),
        )
        self._failure: BaseException | None = None
        self._stopping = False

    def run(self) -> int:
        """Run the reactor and return the exit code; raise StartError if the start failed."""
        self._reactor.callWhenRunning(self._start)
        self._reactor.run()
        self._descendants.finish()
        if self._failure is not None:
            raise self._failure
        return os.EX_OK

    def _start(self) -> None:
        server = self._server
        self._descendants.begin()
        for number, act in {
            signal.SIGTERM: lambda: self._stop(False),
            signal.SIGINT: lambda: self._stop(True),
            signal.SIGQUIT: lambda: self._stop(True),
            signal.SIGHUP: server.pool.reload,
            signal.SIGTTIN: lambda: server.pool.resize(1),
            signal.SIGTTOU: lambda: server.pool.resize(-1),
            signal.SIGUSR2: server.dump,
        }.items():
            # A signal handler may interrupt any code, so the action waits for its own iteration of
            # the reactor.
            signal.signal(number, lambda *_, act=act: self._reactor.callFromThread(act))
        started = self._server.start()
        started.addCallbacks(lambda _: self._ready(), self._failed)

    def _ready(self) -> None:
        listeners = self._server.listeners
        peers = self._settings.allowed_peers
        warnings = [open_socket_warning(each.address.spec, each.host, peers) for each in listeners]
        for line in filter(None, [self._warning, *warnings]):
            self._log.warn("{line}", line=line)
        names = [listener.address.for_postfix(listener.port) for listener in listeners]
        if os.geteuid() == privileges.ROOT:
            self._log.warn(
                "the service runs as root, and so do milters that read hostile mail; {remedy}",
                remedy=privileges.REMEDY,
            )
        self._log.info(
            "ready with {n} workers; main.cf: smtpd_milters = {names}",
            n=self._workers,
            names=" or ".join(names),
        )
        fd = self._settings.ready_fd
        if fd is not None:
            try:
                os.write(fd, b"\n")
                os.close(fd)
            except OSError as error:
                self._log.warn("--ready-fd {fd}: {why}", fd=fd, why=error.strerror)
        hide_memory()  # from workers, before the first message arrives
        # Imported now, because it may be needed when no file descriptor is left.
        import psutil  # noqa: F401

        gc.collect()
        gc.freeze()  # later collections skip the objects that exist now
        gc.enable()

    def _failed(self, failure: Failure) -> None:
        if not self._stopping:  # a service that is stopped before it is ready has not failed
            self._failure = failure.value
            self._stop(True)

    def _stop(self, quick: bool) -> None:
        again, self._stopping = self._stopping, True
        stopped = self._server.stop(quick=quick or again)
        if not again:
            stopped.addCallback(lambda _: self._end())

    def _end(self) -> None:
        """Stop the reactor; threads of milters that still run must not keep the process alive."""
        if self._settings.in_master and self._failure is None:
            threads.exit_after(threads.GRACE, os.EX_OK, self._log_threads)
        self._reactor.stop()

    def _log_threads(self, names: str) -> None:
        self._descendants.finish()
        self._log.warn(
            "threads of milters in the master have not ended within {n:g} s; the process ends"
            " without them: {names}",
            n=threads.GRACE,
            names=names,
        )
        logs.finish()


def main() -> None:
    """Run the program; this is its entry point."""
    run(daemon, NAME)
