"""Tables, targets and JSON of a bench."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import peak
from bench.report import Report, Target, arguments, costs, figures
from bench.rounds import Rounds
from bench.subjects import PEERS

from .runs import run


def test_a_target_says_whether_it_is_met() -> None:
    slow = Target("time", 12.34, 10, "ms")
    assert (slow.met, str(slow)) == (False, "time: 12.3 ms (target: at most 10 ms): missed")
    fast = Target("share", 0.95, 0.95, at_least=True)
    assert (fast.met, str(fast)) == (True, "share: 0.95 (target: at least 0.95): met")


def test_everything_that_is_printed_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report("Is it fast?\n\n    python -m bench.fast\n")
    report.table("a table", [{"milter": "ours", "mails/s": 1234.5}, {"milter": "b", "mails/s": 2}])
    report.target(Target("ratio", 2.0, 1.0))
    path, section = tmp_path / "figures.json", tmp_path / "figures.md"
    files = ["--json", str(path), "--markdown", str(section)]
    monkeypatch.setattr("sys.argv", ["/there/bench/fast.py", *files, "--rounds", "2"])
    report.save(arguments("").parse_args(files))
    saved = json.loads(path.read_text())
    assert saved["question"] == "Is it fast?"
    assert saved["machine"].keys() == {"python", "system", "cores", "load", "commit"}
    assert saved["tables"]["a table"][0] == {"milter": "ours", "mails/s": 1234.5}
    assert saved["targets"][0]["met"] is False
    printed = capsys.readouterr().out
    for word in ("Is it fast?", "a table", "1,234", "ratio: 2 (target: at most 1): missed"):
        assert word in printed
    written = section.read_text()
    assert written.startswith("### fast.py\n\n`python -m bench.fast --rounds 2`: python 3.")
    assert "a table:\n\n| milter | mails/s |\n| --- | --- |\n| ours | 1,234 |\n" in written
    assert "\n| ratio | 2 |  | at most 1 | missed |\n" in written


def test_nothing_is_saved_without_a_path() -> None:
    Report(__doc__).save(arguments(__doc__).parse_args([]))


def test_a_process_has_used_memory() -> None:
    peak.reset(os.getpid())
    assert peak.of(os.getpid()) > 1_000_000


def test_every_peer_says_how_to_install_it() -> None:
    assert all(peer.install for peer in PEERS)
    assert len({peer.name for peer in PEERS}) == len(PEERS)


def test_figures_are_the_medians_of_the_rounds() -> None:
    rounds = [run(100, 30), run(400, 10), run(200, 20)]
    assert figures(rounds) == {
        "mails/s": 200.0, "p50 ms": 1.0, "p99 ms": 2.0, "client": "10%", "verdicts": "accept",
    }  # fmt: skip
    assert costs(rounds)["master µs"] == pytest.approx(20)


def test_the_summary_has_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("?")
    report.target(Target.of("ratio", Rounds([1.0, 2.5, 2.0]), 1.5, at_least=True))
    report.target(Target("time", 12.34, 10, "ms"))
    capsys.readouterr()
    report.summary()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ratio", "2", "1", "to", "2.5", "at", "least", "1.5", "met"] in lines
    assert ["time", "12.3", "ms", "at", "most", "10", "ms", "missed"] in lines
