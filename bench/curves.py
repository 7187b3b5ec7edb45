"""The drawings of `bench.peers`: how far workers carry, and what load does to latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.client import Load, Run, drive
from bench.subjects import Job, Subject
from sharded_milter.sizing.svg import Chart, Line

# A light content scan: long enough that the cores are what is short.
SCAN_MS = 10.0

WORKERS = (1, 2, 3, 4)

# Enough that no worker waits for a message, few enough for milters with a thread for each.
CONNECTIONS = 8

LOADS = (1, 2, 4, 8, 16, 32, 64)


def run(subject: Subject, job: Job, connections: Sequence[int], seconds: float) -> list[Run]:
    """One server, one result for each load."""
    with subject.serving(job) as server:
        drive(server, Load(max(connections), seconds=seconds / 4))  # warm
        return [drive(server, Load(n, seconds=seconds)) for n in connections]


def draw(folder: Path, subjects: Sequence[Subject], seconds: float, machine: str) -> None:
    """Measures and writes throughput.svg, latency-p50.svg and latency-p99.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "throughput.svg").write_text(throughput(subjects, seconds, machine).svg())
    results = {s.name: run(s, Job(), LOADS, seconds) for s in subjects}
    medians = {name: [each.p50 for each in loads] for name, loads in results.items()}
    slowest = {name: [each.p99 for each in loads] for name, loads in results.items()}
    for name, latencies in (("p50", medians), ("p99", slowest)):
        chart = latency(name, latencies, machine)
        (folder / f"latency-{name}.svg").write_text(chart.svg())


def throughput(subjects: Sequence[Subject], seconds: float, machine: str) -> Chart:
    """Messages a second against workers; a milter without workers is a flat line."""

    def rate(subject: Subject, workers: int) -> float:
        return run(subject, Job(SCAN_MS, workers), [CONNECTIONS], seconds)[0].rate

    lines = []
    for subject in subjects:
        if subject.has_workers:
            lines.append(Line(subject.name, [rate(subject, workers) for workers in WORKERS]))
        else:
            lines.append(Line(subject.name, [rate(subject, 1)] * len(WORKERS), flat=True))
    note = f"Each burns {SCAN_MS:g} ms of CPU; {CONNECTIONS} connections; {machine}"
    return Chart("Messages a second", note, "worker processes", list(map(str, WORKERS)), lines)


def latency(name: str, latencies: Mapping[str, Sequence[float]], machine: str) -> Chart:
    """Milliseconds from MAIL to the verdict against busy connections."""
    lines = [
        Line(subject, [1000 * seconds for seconds in all_loads])
        for subject, all_loads in latencies.items()
    ]
    title = f"Latency of a message, {name}, in ms"
    note = f"Cheap scans of 10 KB over UNIX sockets (purepythonmilter: TCP); {machine}"
    steps = list(map(str, LOADS))
    return Chart(title, note, "connections that send without a pause", steps, lines, log=True)
