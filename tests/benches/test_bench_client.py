"""The load client in C, and the package's own where there is no gcc."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import client
from bench.client import Load, Result, compiled, drive, parsed, send
from bench.server import ADDS_A_HEADER, Server, serving

pytestmark = pytest.mark.integration

REFUSES = """
from sharded_milter import Accept, Milter, Reject, TempFail

milter = Milter("refuses")

@milter.rcpt(light=True)
def rcpt(recipient, envelope):
    return Reject("no such user") if recipient.local != "b0" else None

@milter.eom
def eom(message):
    return TempFail("later") if message.body else Accept()
"""


def needs_gcc() -> Path:
    program = compiled()
    if program is None:
        pytest.skip("gcc is not installed")
    return program


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(ADDS_A_HEADER.format(ms=0), "--workers", "1") as started:
        yield started


@pytest.fixture
def without_gcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "compiled", lambda: None)


def test_the_line_of_the_client_becomes_a_result() -> None:
    line = (
        "messages=3 seconds=0.500000 rate=6.000 p50_ms=1.5000 p99_ms=20.0000 max_ms=30.0000"
        " cpu=0.000100 lost=0 accept=2 continue=0 reject=1 tempfail=0 discard=0\n"
    )
    result = parsed(line)
    assert result == Result(3, 0.5, 0.0015, 0.02, 0.03, 0.0001, {"accept": 2, "reject": 1})
    assert result.rate == 6.0


@pytest.mark.parametrize(
    "wanted",
    [
        Load(3, messages=30),
        Load(3, messages=30, each=1),
        Load(3, messages=30, each=4),
        Load(40, messages=30),
        Load(2, messages=30, body=300_000),
        Load(2, messages=30, separate=True),
        Load(1, messages=30, body=0, recipients=7),
    ],
    ids=str,
)
def test_every_message_is_answered(server: Server, wanted: Load) -> None:
    needs_gcc()
    run = drive(server, wanted)
    assert (run.messages, run.verdicts) == (30, {"accept": 30})
    assert 0 < run.p50 <= run.p99 <= run.longest <= run.seconds
    assert 0 < run.client_cpu < run.seconds


def test_a_run_may_end_by_the_clock(server: Server) -> None:
    needs_gcc()
    run = drive(server, Load(2, seconds=0.5))
    assert run.messages > 2
    assert 0.4 < run.seconds < 5
    assert run.master_cpu > 0


@pytest.mark.parametrize("tcp", [True, False])
def test_the_milter_is_reached_by_tcp_too(tcp: bool) -> None:
    needs_gcc()
    with serving(ADDS_A_HEADER.format(ms=0), "--workers", "1", tcp=tcp) as started:
        assert drive(started, Load(2, messages=6, separate=True)).messages == 6


def test_refusals_are_told_apart() -> None:
    needs_gcc()
    with serving(REFUSES, "--workers", "1") as started:
        assert drive(started, Load(1, messages=4)).verdicts == {"tempfail": 4}
        assert drive(started, Load(1, messages=4, body=0)).verdicts == {"accept": 4}
        assert drive(started, Load(1, messages=4, body=0, recipients=3)).verdicts == {"accept": 4}


def test_without_gcc_the_packages_own_client_sends_the_same(
    server: Server, without_gcc: None
) -> None:
    run = drive(server, Load(3, messages=9, body=100_000, recipients=2))
    assert (run.messages, run.verdicts) == (9, {"accept": 9})
    assert 0 < run.p50 <= run.longest
    assert drive(server, Load(2, seconds=0.3, separate=True)).messages > 0


def test_without_gcc_connections_last(server: Server, without_gcc: None) -> None:
    with pytest.raises(SystemExit, match="needs gcc"):
        drive(server, Load(1, messages=1, each=1))


def test_one_line_says_that_there_is_no_gcc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiled.__wrapped__() is None
    assert capsys.readouterr().out.count("\n") == 1


def test_a_milter_that_is_not_there_ends_the_bench(tmp_path: Path) -> None:
    needs_gcc()
    with pytest.raises(SystemExit, match="nowhere: No such file"):
        send(f"{tmp_path}/nowhere", Load(1, messages=1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage: milterload"),
        (["-c", "0", "/s"], "-c 0: it must be a number from 1 to"),
        (["-s", "soon", "/s"], "-s soon: it must be a number of seconds"),
        (["192.0.2.1:25"], "it must be /PATH or 127.0.0.1:PORT"),
    ],
)
def test_wrong_usage_is_explained(words: list[str], said: str) -> None:
    done = subprocess.run([needs_gcc(), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert said in done.stderr


def test_a_message_in_a_file_is_sent(server: Server, tmp_path: Path) -> None:
    program = needs_gcc()
    mail = tmp_path / "mail"
    mail.write_bytes(b"Subject: folded\n once\nX-Empty:\n\n" + b"text\r\n" * 1000)
    done = subprocess.run(
        [program, "-n", "3", "-N", "-k", "1000", "-e", mail, server.path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert parsed(done.stdout).verdicts == {"accept": 3}
