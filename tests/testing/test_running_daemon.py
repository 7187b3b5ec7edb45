"""A private daemon serves, reports why it did not start, and ends with its block."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sharded_milter.errors import MilterLoadError, StartError, UsageError
from sharded_milter.testing.daemon import (
    Daemon,
    Summary,
    answered_by_policy,
    lost_workers,
    running,
    summaries,
    workers,
)
from sharded_milter.testing.mta import Mail, MtaClient

MILTER = """
from sharded_milter import Message, Milter, Reject
milter = Milter("refuses")
@milter.eom
def scan(message: Message) -> Reject:
    {line}
"""


def milter(folder: Path, line: str = 'return Reject("no")') -> str:
    path = folder / "refuses.py"
    path.write_text(MILTER.format(line=line))
    return f"{path}:milter"


def gone(daemon: Daemon, pids: list[int]) -> bool:
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(alive, timeout=10)
    # The parent of the workers of a killed daemon may not reap them.
    left = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    return not left and not Path(daemon.path).parent.exists()


def test_it_serves_and_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    monkeypatch.setenv("SHARDED_MILTER_LOG_LEVEL", "error")
    with running("--workers=1", milter(tmp_path)) as daemon:
        pids = [daemon.pid, *(child.pid for child in psutil.Process(daemon.pid).children())]
        before = len(daemon.log_text())
        with MtaClient.to_path(daemon.path) as mta:
            mta.deliver(Mail(b"A: b\r\n\r\n", queue_id="Q1"))
        with MtaClient.to_path(daemon.path):  # the answer comes before the line, in the same turn
            pass
        (summary,) = summaries(daemon.log_text(before))
        assert (summary.queue_id, summary.shard) == ("Q1", "1")
    assert len(pids) == 2
    assert gone(daemon, pids)


def test_why_the_policy_answered(tmp_path: Path) -> None:
    with running("--workers=1", milter(tmp_path, "raise ValueError('x')")) as daemon:
        with MtaClient.to_path(daemon.path) as mta:
            mta.deliver(Mail(b"A: b\r\n\r\n", queue_id="Q1"))
        assert answered_by_policy(daemon.log_text()) == ["qid=Q1 at eom: ValueError: x"]
        assert lost_workers(daemon.log_text()) == []


def test_who_died_is_counted_and_is_no_worker_less_that_was_asked_for(tmp_path: Path) -> None:
    with running("--workers=2", milter(tmp_path, "import os; os._exit(3)")) as daemon:
        with MtaClient.to_path(daemon.path) as mta:
            mta.deliver(Mail(b"A: b\r\n\r\n", queue_id="Q1"))
        log = daemon.log_text()
    assert lost_workers(log) == ["exited with code 3"] * len(lost_workers(log)) != []
    assert workers(log) == 2


def test_log_lines_are_read() -> None:
    log = (
        "2026-11-26T00:58:06+0000 info  ready with 1 workers\n"
        "2026-11-26T00:58:06+0000 info  qid=4F size=11 verdict=accept actions=1 shard=1,2"
        " queue_ms=0.1 scan_ms=12.7\n"
    )
    assert summaries(log) == [Summary("4F", "1,2", 0.1, 12.7)]
    assert answered_by_policy(log) == []
    assert workers(log) == 1
    assert workers(log.partition("\n")[2]) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--workers=0"], UsageError, "Invalid value for '--workers'"),
        (["./nothing.py:milter"], MilterLoadError, "does not exist"),
    ],
)
def test_why_it_does_not_start_is_told_in_its_words(
    arguments: list[str], error: type[StartError], words: str
) -> None:
    with pytest.raises(StartError, match=words) as caught, running(*arguments):
        pass
    assert caught.value.exit_code == error.exit_code
    assert not str(caught.value).startswith("sharded-milter")


def test_the_authors_traceback_is_there(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise ValueError('no database')\n")
    with pytest.raises(StartError, match="cannot be imported") as caught, running(f"{path}:milter"):
        pass
    assert "raise ValueError('no database')" in caught.value.details


@pytest.fixture
def untouched() -> Iterator[None]:
    """Set the default signal handlers, which the starter of the tests may have changed."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as caught, running("--workers=1", milter(tmp_path)) as daemon:
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    assert gone(daemon, [daemon.pid])
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.usefixtures("untouched")
def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with running("--workers=1", milter(tmp_path)) as daemon:
        os.kill(os.getpid(), signal.SIGHUP)
    assert gone(daemon, [daemon.pid])
