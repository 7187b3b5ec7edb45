"""What workers leave running: real processes, of which a process of its own is the master."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from twisted.internet.task import Clock

from sharded_milter.forks import MARKED_LIMIT
from sharded_milter.pool.descendants import REAP_AFTER_SWEEPS, Descendants

PATIENCE = 60.0

# The master of a script: `start` makes a worker with a mark, which does what its own script says.
PRELUDE = """
import os, resource, signal, subprocess, sys, time
from twisted.internet.task import Clock
from sharded_milter.pool.descendants import (
    REAP_AFTER_SWEEPS, SWEEP_AGAIN_AFTER, SWEEP_INTERVAL, Descendants
)
clock = Clock()

def start(mark, script):
    worker = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(10, (mark, mark)) if mark else None)
    return worker

def pids(worker, count=1):
    return [int(worker.stdout.readline()) for _ in range(count)]

def state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""

def sleeps(pid, session):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().startswith("sleep\\x00600") and os.getsid(int(pid)) == session
    except OSError:  # somebody else's, which has ended since it was listed
        return False

def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
        clock.advance(SWEEP_AGAIN_AFTER)

# A program that leaves a daemon in a session of its own, twice forked, and says its pid.
DAEMON = '''
import os, sys, time
if not os.fork():
    os.setsid()
    if not os.fork():
        for fd in (0, 2): os.close(fd)
        os.environ.clear()
        os.execv("/bin/sh", ["sh", "-c", "echo $$; exec >&-; MORE exec sleep 600"])
    os._exit(0)
os.wait()
'''
HANG = DAEMON.replace("MORE", "setsid sleep 600 &") + "time.sleep(600)"
DAEMON = DAEMON.replace("MORE", "")

def lives(pid):
    return state(pid) not in ("", "Z")
"""


def play(script: str, *wrapper: str) -> str:
    """What the script of a master says, which must end well."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# In a process id namespace the master is the first process, as in a container.
EVERYWHERE = pytest.mark.parametrize(
    "wrapper",
    [(), ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")],
    ids=["plain", "first"],
)


@EVERYWHERE
def test_a_daemon_ends_with_its_worker_and_so_does_what_it_has_started(
    wrapper: tuple[str, ...],
) -> None:
    play(
        """
        descendants = Descendants(clock)
        descendants.begin()
        mark = descendants.mark()
        worker = start(mark, HANG)
        [daemon] = pids(worker)
        until(lambda: len(descendants._list_children()) > 1)
        for _ in range(5):
            clock.advance(SWEEP_INTERVAL)
        assert lives(daemon)  # its worker lives
        worker.kill(); worker.wait()
        descendants.end(mark)
        until(lambda: not descendants._list_children())
        assert not state(daemon)
        assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and sleeps(pid, daemon)]
        """,
        *wrapper,
    )


@EVERYWHERE
def test_the_daemons_of_others_are_spared(wrapper: tuple[str, ...]) -> None:
    """Those of the operator, of milters in the master, and of workers that live."""
    play(
        """
        descendants = Descendants(clock)
        descendants.begin()
        dead, alive = descendants.mark(), descendants.mark()
        other = Descendants(clock).mark()  # another master's
        workers = {mark: start(mark, DAEMON) for mark in (dead, alive, other, 0)}
        daemons = {mark: pids(worker)[0] for mark, worker in workers.items()}
        for worker in workers.values():
            worker.wait()
        until(lambda: set(daemons.values()) <= set(descendants._list_children()))
        descendants.end(dead)
        until(lambda: not state(daemons[dead]))
        for _ in range(10):
            clock.advance(SWEEP_INTERVAL)
        assert all(lives(daemons[mark]) for mark in (alive, other, 0))
        descendants.finish()
        assert not state(daemons[alive])
        assert all(lives(daemons[mark]) for mark in (other, 0))
        for mark in (other, 0):
            os.killpg(os.getsid(daemons[mark]), signal.SIGKILL)
        """,
        *wrapper,
    )


def test_no_descriptor_is_needed_to_find_and_end_them() -> None:
    play(
        """
        descendants = Descendants(clock)
        descendants.begin()
        mark = descendants.mark()
        worker = start(mark, HANG)
        [daemon] = pids(worker)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        worker.kill(); worker.wait()
        descendants.end(mark)
        until(lambda: not descendants._list_children())
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not state(daemon)
        """
    )


@EVERYWHERE
def test_orphans_that_have_ended_are_reaped(wrapper: tuple[str, ...]) -> None:
    play(
        """
        descendants = Descendants(clock)
        descendants.begin()
        for mark in (descendants.mark(), 0):
            worker = start(mark, DAEMON)
            [daemon] = pids(worker)
            worker.wait()
            os.killpg(os.getsid(daemon), signal.SIGKILL)
            until(lambda: not state(daemon))
        """,
        *wrapper,
    )


def test_nobody_who_waits_for_a_child_in_the_master_loses_its_exit_code() -> None:
    play(
        """
        descendants = Descendants(clock, shares=True)
        descendants.begin()
        child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
        until(lambda: state(child.pid) == "Z")
        for _ in range(REAP_AFTER_SWEEPS // 2):
            clock.advance(SWEEP_INTERVAL)
        assert child.wait() == 7
        # An orphan, for whom nobody waits, is reaped later.
        worker = start(0, DAEMON)
        [daemon] = pids(worker)
        worker.wait()
        os.killpg(os.getsid(daemon), signal.SIGKILL)
        until(lambda: state(daemon) == "Z")
        for _ in range(REAP_AFTER_SWEEPS + 1):
            clock.advance(SWEEP_INTERVAL)
        assert not state(daemon)
        clock.advance(SWEEP_INTERVAL)
        assert not descendants._zombies
        """
    )


def test_children_that_are_asked_about_are_forgotten() -> None:
    play(
        """
        descendants = Descendants(clock, shares=True)
        descendants.begin()
        child = subprocess.Popen(["true"])
        until(lambda: state(child.pid) == "Z")
        clock.advance(SWEEP_INTERVAL)
        assert descendants._zombies
        child.wait()
        clock.advance(SWEEP_INTERVAL)
        assert not descendants._zombies
        """
    )


def test_a_process_that_twisted_waits_for_is_left_to_it() -> None:
    play(
        """
        from twisted.internet import process
        descendants = Descendants(clock)
        descendants.begin()
        mark = descendants.mark()
        worker = start(mark, "raise SystemExit(7)")
        process.reapProcessHandlers[worker.pid] = None
        until(lambda: state(worker.pid) == "Z")
        descendants.end(mark)
        assert worker.wait() == 7
        """
    )


def test_where_there_can_be_no_mark_nothing_is_ended_by_it() -> None:
    play(
        """
        resource.setrlimit(10, (1000, 1000))
        descendants = Descendants(clock)
        descendants.begin()
        assert descendants.mark() == 0
        worker = start(0, DAEMON)
        [daemon] = pids(worker)
        worker.wait()
        descendants.end(0)
        descendants.finish()
        assert lives(daemon)
        os.killpg(os.getsid(daemon), signal.SIGKILL)
        """
    )


def test_a_master_below_a_marked_worker_has_marks_that_it_can_give() -> None:
    play(
        """
        outer = Descendants(clock).mark()
        resource.setrlimit(10, (outer, outer))
        inner = Descendants(clock).mark()
        assert 0 < inner < outer
        resource.setrlimit(10, (inner, inner))
        """
    )


def test_marks_differ() -> None:
    descendants = Descendants(Clock())
    assert len({descendants.mark() for _ in range(100)}) == 100


def test_without_a_start_nothing_is_looked_at() -> None:
    descendants = Descendants(Clock())
    descendants.end(descendants.mark())
    descendants.finish()
    assert descendants._list_children() == ()
    assert REAP_AFTER_SWEEPS > 0


def test_the_limit_that_bears_the_mark_limits_nothing(tmp_path: Path) -> None:
    """A process with the smallest mark locks as many files as another."""
    script = (
        "import fcntl, resource\n"
        f"resource.setrlimit({MARKED_LIMIT}, (1, 1))\n"
        "files = [open(f'{n}', 'w') for n in range(20)]\n"
        "for file in files: fcntl.lockf(file, fcntl.LOCK_EX)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=PATIENCE)
    assert resource.prlimit(psutil.Process().pid, MARKED_LIMIT)
