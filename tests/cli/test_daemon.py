"""The daemon up to the point where its reactor runs; other tests run it for real."""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from integration.machine import free_port
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from sharded_milter import scanner
from sharded_milter.cli import daemon as module
from sharded_milter.cli.daemon import (
    SCANNER,
    SCANNER_RULES,
    daemon,
    script_address,
    serve,
    switch_user,
    unfit_for_root,
    worker_specs,
)
from sharded_milter.errors import (
    ConfigError,
    MilterLoadError,
    NotPermitted,
    SocketTaken,
    UsageError,
)
from sharded_milter.mta.addresses import parse_listen
from sharded_milter.ops import privileges
from sharded_milter.ops.config import DEFAULT_LISTEN, Settings
from sharded_milter.ops.privileges import Account
from sharded_milter.pool import spawned as spawning


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """Restore signal handlers, limits and the garbage collector of this process."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTTIN,
               signal.SIGTTOU, signal.SIGUSR2]  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in numbers}
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    resource.setrlimit(resource.RLIMIT_NOFILE, files)
    gc.unfreeze()
    gc.enable()


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "milter.sock"


def settings(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Settings:
    """Return the settings that the daemon would serve."""
    served: list[Settings] = []

    def keep(settings: Settings) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr(module, "serve", keep)
    result = CliRunner().invoke(daemon, arguments, standalone_mode=False)
    assert result.exception is None
    return served[0]


def test_without_a_milter_the_scanner_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_specs(settings(monkeypatch)) == (SCANNER,)
    assert worker_specs(settings(monkeypatch, "--scanner-rules", "/etc")) == (SCANNER,)


def test_a_milter_that_is_named_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_specs(settings(monkeypatch, "x.py:milter", "y:Y")) == ("x.py:milter", "y:Y")
    beside = settings(monkeypatch, "--in-master", "z:Z", "x.py:milter")
    assert (worker_specs(beside), beside.in_master) == (("x.py:milter",), ("z:Z",))


def test_workers_are_for_those_milters_only_that_run_in_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert worker_specs(settings(monkeypatch, "--in-master", "z:Z")) == ()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ["a:b", "--scanner-rules", "/etc"],
            "--scanner-rules needs the content scanner, but",
        ),
        (["--in-master", "a:b", "--scanner-rules", "/etc"], "but the milters given are a:b"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(
    arguments: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=why):
        worker_specs(settings(monkeypatch, *arguments))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "the content scanner"),
        ([SCANNER, "x:y"], "the content scanner"),
        (["x:y", f"{Path(scanner.__file__).parent}/milter.py:milter"], "the content scanner"),
        (["--in-master", SCANNER, "x:y"], "the content scanner"),
        (["--pymilter", "s.py"], "--pymilter s.py"),
        (["x:y", "./scanner/milter.py:milter"], ""),
    ],
)
def test_root_runs_no_scanner_and_no_script(
    arguments: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = settings(monkeypatch, *arguments)
    assert unfit_for_root(found, worker_specs(found)) == what
    if what:
        monkeypatch.undo()  # of the serve() that only keeps the settings
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        with pytest.raises(NotPermitted, match=f"^{what} does not run as root"):
            serve(found)


def test_a_keep_dir_is_looked_at_with_the_rights_that_will_use_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become: list[Account] = []
    monkeypatch.setattr(privileges, "become", become.append)
    chosen = settings(monkeypatch, "x:y", "--keep-dir", str(tmp_path))
    somebody = Account("somebody", 1, 1, (1,), "/")
    switch_user(chosen, somebody)
    assert become == [somebody]
    tmp_path.rmdir()
    with pytest.raises(NotPermitted, match=f"--keep-dir {tmp_path}: user "):
        switch_user(chosen, somebody)


class FakeServer:
    """A server that starts and stops when the test does it."""

    def __init__(self, listeners: list[Any], *rest: Any, **more: Any) -> None:
        from twisted.internet.defer import Deferred

        self.listeners = listeners
        self.rest = rest
        self.told: list[str] = []
        self.started: Deferred[None] = Deferred()
        self.stopped: Deferred[None] = Deferred()
        self.pool = self
        FakeServer.latest = self

    latest: FakeServer

    def start(self) -> Any:
        return self.started

    def stop(self, *, quick: bool) -> Any:
        self.told.append("quick stop" if quick else "stop")
        return self.stopped

    def reload(self) -> None:
        self.told.append("reload")

    def resize(self, change: int) -> None:
        self.told.append(f"resize {change:+}")

    def dump(self) -> None:
        self.told.append("dump")


class FakeReactor(Clock):
    """A reactor that runs scripted calls until it is stopped."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script
        self.stopped = False

    def callWhenRunning(self, function: Any) -> None:
        self.begin = function

    def callFromThread(self, function: Any) -> None:
        function()

    def run(self) -> None:
        self.begin()
        self.script(FakeServer.latest)
        assert self.stopped

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that serves with a fake reactor and server, by a script."""

    def run(script: Any, *arguments: str) -> int:
        chosen = settings(monkeypatch, "--allow-root", *arguments)
        monkeypatch.setattr("twisted.internet.reactor", FakeReactor(script), raising=False)
        monkeypatch.setattr("sharded_milter.server.Server", FakeServer)
        monkeypatch.setattr("sharded_milter.ops.logs.begin", lambda level: None)
        return serve(chosen)

    return run


def test_a_scripts_socket_is_bound_as_the_operator_wants_it(running: Any, tmp_path: Path) -> None:
    found = []

    def script(server: FakeServer) -> None:
        bind = server.rest[-1]
        [listener] = bind(f"unix:{tmp_path}/s")
        found.append((listener.address.path, (tmp_path / "s").stat().st_mode & 0o777))
        begin_and_end(server)

    assert running(script, "--socket-mode", "606", "--pymilter", "x.py") == 0
    assert found == [(f"{tmp_path}/s", 0o606)]
    assert not (tmp_path / "s").exists()


def test_a_scripts_socket_that_the_user_may_not_bind_is_told_with_the_cure(
    running: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = []

    def refuse(*arguments: object) -> None:
        raise NotPermitted("cannot listen")

    def script(server: FakeServer) -> None:
        with pytest.raises(NotPermitted) as caught:
            server.rest[-1](f"unix:{tmp_path}/s")
        said.append(str(caught.value))
        begin_and_end(server)

    monkeypatch.setattr(privileges, "become", lambda wanted: None)
    monkeypatch.setattr(module, "Listener", refuse)
    for user in ([], [f"--user={os.getuid()}"]):
        assert running(script, *user, "--pymilter", "x.py") == 0
        monkeypatch.setattr(module, "serve", serve)
    assert said == ["cannot listen", "cannot listen; give it with --listen, then root binds it"]


@pytest.mark.parametrize("wanted", ["", "fd:3"])
def test_a_socket_that_the_master_cannot_have_is_the_default(wanted: str) -> None:
    assert script_address(wanted) == parse_listen(DEFAULT_LISTEN)


def test_a_socket_in_words_of_nobody_ends_the_start() -> None:
    with pytest.raises(ConfigError, match=r"^the script's socket 'inet:99999@h': port 99999"):
        script_address("inet:99999@h")


def test_a_script_and_its_arguments_are_what_workers_get(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings(monkeypatch, "--pymilter", "x.py", "--", "-v", "conf")
    assert worker_specs(found) == ("x.py", "-v", "conf")


def begin_and_end(server: FakeServer) -> None:
    server.started.callback(None)
    os.kill(os.getpid(), signal.SIGTERM)
    server.stopped.callback(None)


@pytest.mark.parametrize("uid", [0, 1234])
def test_root_is_warned_of_itself_with_the_cure_when_it_serves(
    uid: int, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with capturedLogs() as events:
        assert running(begin_and_end, "--listen", f"inet:{free_port()}@127.0.0.1", "x:y") == 0
    said = [event["log_format"].format(**event) for event in events]
    assert [line.endswith("; give --user NAME") for line in said] == [True] * (uid == 0) + [False]


def test_what_has_started_is_not_looked_at_by_collections(running: Any, socket_path: Path) -> None:
    def script(server: FakeServer) -> None:
        assert not gc.isenabled()
        begin_and_end(server)

    assert running(script, "--listen", str(socket_path)) == 0
    assert gc.isenabled()
    assert gc.get_freeze_count()


def test_signals_are_orders(running: Any, socket_path: Path) -> None:
    def script(server: FakeServer) -> None:
        server.started.callback(None)
        for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2,
                       signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):  # fmt: skip
            os.kill(os.getpid(), number)
        server.stopped.callback(None)

    assert running(script, "--listen", str(socket_path)) == 0
    orders = ["reload", "resize +1", "resize -1", "dump", "stop"]
    assert FakeServer.latest.told == [*orders, *["quick stop"] * 3]
    assert not socket_path.exists()


def test_ready_is_told_to_a_descriptor(running: Any, socket_path: Path) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as ready:
        assert running(begin_and_end, "--listen", str(socket_path), f"--ready-fd={writer}") == 0
        assert ready.read() == b"\n"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(writer)


def test_a_descriptor_that_is_not_there_does_not_keep_it_from_serving(
    running: Any, socket_path: Path
) -> None:
    assert running(begin_and_end, "--listen", str(socket_path), "--ready-fd=999999") == 0


def test_what_keeps_it_from_starting_is_raised_when_all_has_ended(
    running: Any, socket_path: Path
) -> None:
    error = MilterLoadError("milter x: no", "traceback")

    def script(server: FakeServer) -> None:
        server.started.errback(error)
        assert server.told == ["quick stop"]
        server.stopped.callback(None)

    with pytest.raises(MilterLoadError) as caught:
        running(script, "--listen", str(socket_path))
    assert caught.value is error
    assert not socket_path.exists()


def test_a_socket_that_cannot_be_bound_leaves_none_behind(
    running: Any, socket_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="/none is not an existing directory"):
        running(begin_and_end, "--listen", str(socket_path), "--listen", f"{tmp_path}/none/x")
    assert not socket_path.exists()


def test_the_same_socket_twice_is_taken(running: Any, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        spec = f"inet:{server.getsockname()[1]}@127.0.0.1"
        with pytest.raises(SocketTaken):
            running(begin_and_end, "--listen", spec)


def test_as_many_connections_are_allowed_as_the_system_lets_us_have(
    running: Any, socket_path: Path
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, most), most))
    running(begin_and_end, "--listen", str(socket_path))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)


def test_workers_are_started_as_the_operator_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "x")
    chosen = settings(monkeypatch, "--nice=3", "--worker-memory-limit=10", "--cpu-affinity=spread",
                      "--scanner-rules", str(tmp_path))  # fmt: skip
    spawned: list[tuple[Any, int]] = []
    monkeypatch.setattr(
        spawning, "Spawned", lambda workplace, slot, reactor: spawned.append((workplace, slot))
    )
    unused: Any = None
    shard = module.shard_maker(chosen, (SCANNER,), unused, Clock(), 1024)(2, unused)
    ((place, slot),) = spawned
    assert slot == shard.slot == 2
    assert (place.specs, place.nice, place.memory_limit) == ((SCANNER,), 3, 10)
    assert place.open_files == 1024
    assert place.cpus == tuple(sorted(os.sched_getaffinity(0)))
    assert place.env[SCANNER_RULES] == str(tmp_path)
    assert "SECRET" not in place.env
