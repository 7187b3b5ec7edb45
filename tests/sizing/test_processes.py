"""CPU time and memory of a process tree."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sharded_milter.sizing import processes

BURN = "import time\nwhile time.process_time() < 0.2: pass"


def test_a_child_that_has_ended_is_counted() -> None:
    before = processes.cpu(os.getpid())
    subprocess.run([sys.executable, "-c", BURN], check=True)
    used = processes.cpu(os.getpid()) - before
    assert used.workers >= 0.1


def test_a_child_that_lives_is_counted_too() -> None:
    before = processes.cpu(os.getpid())
    command = [sys.executable, "-c", f"{BURN}\nprint(flush=True)\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        used = processes.cpu(os.getpid()) - before
        memory = processes.memory(os.getpid())
        child.communicate(b"\n")
    assert used.workers >= 0.1
    assert memory.master > 1_000_000
    assert memory.worker > 1_000_000


def test_the_whole_machine_is_only_counted_where_all_of_it_is_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: len(os.sched_getaffinity(0)))
    assert processes.machine_cpu() > 0
    monkeypatch.setattr(os, "cpu_count", lambda: len(os.sched_getaffinity(0)) + 1)
    assert processes.machine_cpu() == 0
