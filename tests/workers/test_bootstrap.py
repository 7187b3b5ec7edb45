"""A real worker process, from its start to its end; only the master is the test."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from one_worker import MILTER, PATIENCE, Master, Worker

from sharded_milter.workers.child import MAX_PER_ITERATION


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_a_worker_is_ready_and_answers(folder: Path) -> None:
    with Worker(folder, env={"EXPRESSION": "os.getppid()"}) as worker:
        assert worker.ready().master.evaluated() == str(os.getpid())


def test_timers_of_a_milter_have_their_turn_between_questions(folder: Path) -> None:
    timer = "sys.modules['twisted.internet.reactor'].callLater(0, turns.append, 1)"
    expression = f"(turns := globals().setdefault('turns', []), {timer}, len(turns))[-1]"
    count = 2 * MAX_PER_ITERATION
    with Worker(folder, env={"EXPRESSION": expression}) as worker:
        master = worker.ready().master
        for number in range(count):
            master.put(number)
        master.clock.advance(0)
        answers = [int(master.answer()) for _ in range(count)]
    assert answers[0] == 0
    assert answers[-1] > 0


def test_workers_with_the_same_files_say_so(folder: Path) -> None:
    codes = []
    for text in ("one", "one", "two"):
        (folder / "beside.py").write_text(f"TEXT = {text!r}")
        (folder / "mine.py").write_text(f"import beside\n{MILTER}")
        with Worker(folder, spec="./mine.py:milter") as worker:
            codes.append(worker.ready().master.code)
    assert codes[0] == codes[1] != codes[2]


def test_collections_look_at_what_came_after_the_start_only(folder: Path) -> None:
    expression = "[g for g in [__import__('gc')] if g.isenabled() and g.get_freeze_count()] != []"
    with Worker(folder, env={"EXPRESSION": expression}) as worker:
        assert worker.ready().master.evaluated() == "True"


def test_a_worker_answers_a_ping_before_a_question_that_came_with_it(folder: Path) -> None:
    with Worker(folder) as worker:
        master = worker.ready().master
        master.told.clear()
        for number in range(3):
            master.put(number)
            master.ping()
        assert [master.answer() for _ in range(3)] == ["1"] * 3
        while len(master.told) < 3:
            master.dataReceived(master.sock.recv(65_536))
        assert master.told == ["pong"] * 3


def test_a_worker_ends_with_its_socket(folder: Path) -> None:
    with Worker(folder) as worker:
        worker.ready().sock.close()
        assert worker.wait() == 255


def test_a_worker_ends_well_when_it_is_told_to(folder: Path) -> None:
    from ampoule.commands import Shutdown

    with Worker(folder) as worker:
        done: list[Any] = []
        told = worker.ready().master.callRemote(Shutdown)  # type: ignore[no-untyped-call]
        told.addCallbacks(done.append, done.append)
        worker.master.until(done)
        worker.sock.close()
        assert worker.wait() == 0


def test_a_worker_and_what_it_starts_bear_its_mark(folder: Path) -> None:
    expression = (
        "__import__('subprocess').run(['setsid', 'grep', 'locks', '/proc/self/limits'],"
        " capture_output=True, text=True).stdout.split()[3:5]"
    )
    with Worker(folder, env={"EXPRESSION": expression}, mark=12345678) as worker:
        assert eval(worker.ready().master.evaluated()) == ["12345678"] * 2


def test_a_worker_leaves_the_signals_of_its_group_to_the_master(folder: Path) -> None:
    with Worker(folder) as worker:
        worker.ready()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            worker.process.send_signal(number)
        assert worker.master.evaluated() == "1"


def test_a_worker_shows_its_stacks_on_demand(folder: Path) -> None:
    expression = "[os.kill(os.getpid(), signal.SIGUSR1), 1][1]"
    with Worker(folder, env={"EXPRESSION": expression}) as worker:
        assert worker.ready().master.evaluated() == "1"
        worker.sock.close()
        _, errors = worker.process.communicate(timeout=PATIENCE)
    assert b"real_milter.py" in errors
    assert b"(most recent call first)" in errors


def test_a_worker_whose_master_is_gone_ends_before_it_begins(folder: Path) -> None:
    with Worker(folder, "1") as worker:
        assert worker.wait() == os.EX_TEMPFAIL
        assert worker.master.told == []


@pytest.mark.skipif(sys.platform != "linux", reason="PDEATHSIG is Linux's")
def test_a_worker_dies_with_its_master(folder: Path) -> None:
    """The master is killed; its socket stays open elsewhere, so that only the signal can tell."""
    script = (
        "import os, subprocess, sys\n"
        "command, fd = [sys.executable, '-c', sys.argv[1]], int(sys.argv[2])\n"
        "worker = subprocess.Popen(command, pass_fds=(fd,))\n"
        "print(worker.pid, flush=True); worker.wait()"
    )
    (folder / "real_milter.py").write_text(MILTER)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(PATIENCE)
        fd = theirs.fileno()
        inner = (
            f"import os; os.dup2({fd}, 3); from sharded_milter.workers.bootstrap import main;"
            "main(os.getppid(), ['real_milter:milter'])"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, inner, str(fd)],
            cwd=folder, pass_fds=(fd,), stdout=subprocess.PIPE,
        ) as master:  # fmt: skip
            assert master.stdout is not None
            worker = psutil.Process(int(master.stdout.readline()))
            peer = Master(ours)
            try:
                assert peer.until(peer.told) == "real"
            finally:
                master.kill()
        worker.wait(PATIENCE)


def test_what_a_milter_prints_is_no_part_of_the_conversation(folder: Path) -> None:
    with Worker(folder, env={"SAY": "1", "PYTHONUNBUFFERED": "1"}) as worker:
        assert worker.ready().master.evaluated() == "1"
        assert worker.process.stdout is not None
        assert worker.process.stdout.readline() == b"to stdout\n"


def test_a_milter_that_cannot_be_loaded_is_told(folder: Path) -> None:
    with Worker(folder, spec="real_milter:none") as worker:
        told = worker.master.until(worker.master.told)
        assert told == "milter real_milter:none: real_milter has no 'none'"


def test_the_socket_is_not_for_the_milters_own_children(folder: Path) -> None:
    with Worker(folder, env={"EXPRESSION": "os.get_inheritable(3)"}) as worker:
        with pytest.raises(AssertionError):
            worker.ready().master.evaluated()
        assert worker.process.poll() is None


@pytest.mark.parametrize(
    ("options", "expression", "value"),
    [
        ({}, "os.nice(0)", os.nice(0)),
        ({"nice": 3}, "os.nice(0)", min(19, os.nice(0) + 3)),
        ({"memory_limit": 8 << 30}, "resource.getrlimit(resource.RLIMIT_AS)[0]", 8 << 30),
        ({"open_files": 64}, "resource.getrlimit(resource.RLIMIT_NOFILE)[0]", 64),
        ({}, "resource.getrlimit(resource.RLIMIT_NOFILE)",
         resource.getrlimit(resource.RLIMIT_NOFILE)),
        ({"cpus": (min(os.sched_getaffinity(0)),)}, "os.sched_getaffinity(0)",
         {min(os.sched_getaffinity(0))}),
        ({}, "os.sched_getaffinity(0)", os.sched_getaffinity(0)),
    ],
    ids=repr,
)  # fmt: skip
def test_a_worker_has_what_the_operator_gives_it(
    folder: Path, options: dict[str, Any], expression: str, value: Any
) -> None:
    with Worker(folder, env={"EXPRESSION": expression}, **options) as worker:
        assert eval(worker.ready().master.evaluated()) == value
