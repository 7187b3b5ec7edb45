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


def test_a_meter_has_what_was_used_within_its_block() -> None:
    subprocess.run([sys.executable, "-c", BURN], check=True)
    meter = processes.Meter(os.getpid())
    with meter.running():
        pass
    assert meter.seconds > 0
    assert meter.cpu.workers < 0.2
    with meter.running():
        subprocess.run([sys.executable, "-c", BURN], check=True)
    assert meter.cpu.workers >= 0.1


def test_others_have_no_more_than_the_cores_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    meter = processes.Meter(os.getpid())
    meter.seconds, meter.machine, meter.cpu = 1.0, 1.5, processes.Cpu(0.2, 0.3)
    assert meter.others(0.1, 2) == pytest.approx(0.9)
    meter.machine = 7.0
    assert meter.others(0.1, 2) == pytest.approx(1.4)
    meter.machine = 0.0
    assert meter.others(0.1, 2) == 0.0
    # What the machine does on cores that are not ours is no use of ours.
    meter.machine = 7.0
    assert meter.others(0.1, 1) == 0.0
