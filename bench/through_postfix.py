"""How much mail passes a real Postfix and a real Sendmail with us, with pymilter, and with neither?

    python -m bench.through_postfix [--ms 10 0] [--seconds 4] [--rounds 5] [--bytes 10000]
                                    [--mtas Postfix Sendmail] [--json FILE]

Private instances on loopback (tests/integration) take mail from 16 sessions at a time, one mail a
session, and deliver nothing: Postfix defers all mail, Sendmail queues it. It is checked that all of
it is there, with the milter's header. Needs root, Debian's postfix, what tests/integration/sendmail
lists, and the project's `test` extra.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from bench.report import Report, Row, Target, arguments
from bench.rounds import Rounds, alternating
from bench.server import Server, cores
from bench.subjects import OURS, PYMILTER, Job, all_serving, installed
from sharded_milter.sizing import processes
from sharded_milter.testing.generated import BODY_BYTES
from tests.integration.postfix import Postfix, require_postfix
from tests.integration.sendmail import Sendmail, require_sendmail

# Times pymilter's rate through Postfix, by the CPU ms of a scan.
TIMES_AT_LEAST = {0.0: 1.1, 10.0: 1.8}

SESSIONS = 16

ALONE = "no milter"

# What the milters add to every message.
MARK = b"X-Bench"

# Mails before the first measurement. They say how many a measurement needs.
WARM_MAILS = 100

# What has been accepted is at rest in the queue within that time.
SETTLED = 60.0
_LOOK = 0.02

# One measurement.
_PATIENCE = 600.0

_MICRO = 1e6

# Sendmail's defaults, but that it delivers nothing; the harness logs more.
_QUEUES_ONLY = (
    "define(`confDELIVERY_MODE', `queueonly')dnl",
    "define(`confLOG_LEVEL', `9')dnl",
    "define(`confMILTER_LOG_LEVEL', `5')dnl",
)


@dataclass(frozen=True)
class Mta:
    """A running MTA: a port for each side, and what it has accepted."""

    ports: Mapping[str, int]
    queued: Callable[[str], Sequence[Path]]  # the files of a side with header fields, at rest
    clear: Callable[[str], None]


@contextmanager
def postfix(folder: Path, milters: Mapping[str, str]) -> Iterator[Mta]:
    """One instance with a port for each side, which has nobody to hand mail to."""
    require_postfix()
    services = {name: [address] for name, address in milters.items()}
    deferring = {"defer_transports": "capture"}
    with Postfix(folder / "postfix", services=services, settings=deferring) as instance:
        moving = (instance.queue / "incoming", instance.queue / "active")

        def queued(side: str) -> Sequence[Path]:
            deadline = time.monotonic() + SETTLED
            while any(map(_files, moving)) and time.monotonic() < deadline:
                time.sleep(_LOOK)
            return _files(instance.queue / "deferred")

        ports = {name: instance.port_of(name) for name in services}
        yield Mta({ALONE: instance.port, **ports}, queued, lambda side: instance.clear())


def _files(folder: Path) -> list[Path]:
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]


@contextmanager
def sendmail(folder: Path, milters: Mapping[str, str]) -> Iterator[Mta]:
    """An instance for each side: its milter is the same for all its ports."""
    require_sendmail()
    instances: dict[str, Sendmail] = {}
    try:
        for name, milter in {ALONE: None, **milters}.items():
            home = folder / f"sendmail-{len(instances)}"
            home.mkdir(mode=0o755)
            instances[name] = Sendmail(home, milter=milter, extra=_QUEUES_ONLY)
            instances[name].start()
        ports = {name: instance.port for name, instance in instances.items()}
        yield Mta(
            ports,
            lambda side: list(instances[side].queue.glob("qf*")),
            lambda side: instances[side].clear(),
        )
    finally:
        for instance in instances.values():
            instance.stop()


MTAS = {"Postfix": postfix, "Sendmail": sendmail}


@dataclass(frozen=True)
class Passed:
    """One measurement."""

    rate: float  # mails a second
    cpu: processes.Cpu  # seconds for each mail


def send(mta: Mta, side: str, server: Server | None, mails: int, size: int) -> Passed:
    """So many mails; ends the bench where one is refused, lost or was not seen by the milter."""
    program = shutil.which("smtp-source") or "/usr/sbin/smtp-source"
    options = ["-s", str(SESSIONS), "-m", str(mails), "-l", str(size)]
    envelope = ["-f", "sender@example.org", "-t", "recipient@example.com"]
    command = [program, *options, *envelope, f"127.0.0.1:{mta.ports[side]}"]
    before = _used(server)
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    seconds = time.perf_counter() - began
    used = _used(server) - before
    if done.returncode:
        raise SystemExit(f"{side}: {' '.join(command)}: {done.stderr}")
    found = mta.queued(side)
    marked = sum(MARK in path.read_bytes() for path in found)
    if (len(found), marked) != (mails, mails if server else 0):
        raise SystemExit(
            f"{side}: of {mails} mails {len(found)} are queued, {marked} with {MARK!r}"
        )
    mta.clear(side)
    return Passed(mails / seconds, processes.Cpu(used.master / mails, used.workers / mails))


def _used(server: Server | None) -> processes.Cpu:
    return processes.cpu(server.pid) if server else processes.Cpu(0.0, 0.0)


def ask(report: Report, name: str, ms: float, seconds: float, rounds: int, size: int) -> None:
    """Measures all sides through that MTA, with scans of that CPU time."""
    subjects = [OURS, *installed([PYMILTER], report.say)]
    with (
        tempfile.TemporaryDirectory(prefix="bench-mta-") as folder,
        all_serving(subjects, Job(ms, cores()), public=True) as servers,
    ):
        Path(folder).chmod(0o755)
        milters = {side: f"unix:{server.path}" for side, server in servers.items()}
        with MTAS[name](Path(folder), milters) as mta:
            warm = {
                side: send(mta, side, servers.get(side), WARM_MAILS, size) for side in mta.ports
            }
            mails = {side: max(WARM_MAILS, int(each.rate * seconds)) for side, each in warm.items()}

            def measure(side: str) -> Passed:
                return send(mta, side, servers.get(side), mails[side], size)

            runs = alternating({side: side for side in mta.ports}, rounds, measure)
    rates = {side: Rounds([each.rate for each in several]) for side, several in runs.items()}
    report.table(f"{name}, {SESSIONS} sessions, scans of {ms:g} ms CPU", rows(runs, rates))
    if PYMILTER.name in rates:
        ratio = rates[OURS.name] / rates[PYMILTER.name]
        what = f"mails/s through {name}, ours / pymilter, {ms:g} ms"
        if name == "Postfix" and ms in TIMES_AT_LEAST:
            report.target(Target.of(what, ratio, TIMES_AT_LEAST[ms], at_least=True))
        else:
            report.say(f"{what}: {ratio.middle:.3g} (rounds {ratio.spread})")


def rows(runs: Mapping[str, Sequence[Passed]], rates: Mapping[str, Rounds]) -> list[Row]:
    """A line for each side."""
    return [
        {
            "milter": side,
            "mails/s": rates[side].middle,
            "rounds": rates[side].spread,
            "of no milter": (rates[side] / rates[ALONE]).middle,
            "master µs": _MICRO * median(each.cpu.master for each in several),
            "workers µs": _MICRO * median(each.cpu.workers for each in several),
        }
        for side, several in runs.items()
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ms", type=float, nargs="+", default=[10.0, 0.0], help="CPU of a scan")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a measurement, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=BODY_BYTES, help="of a mail")
    parser.add_argument("--mtas", nargs="+", choices=MTAS, default=list(MTAS))
    options = parser.parse_args()
    report = Report(__doc__)
    for name in options.mtas:
        for ms in options.ms:
            try:
                ask(report, name, ms, options.seconds, options.rounds, options.bytes)
            except pytest.skip.Exception as reason:
                report.say(f"skipped: {name} ({reason})")
    report.save(options)


if __name__ == "__main__":
    main()
