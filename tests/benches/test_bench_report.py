"""Tables, targets and JSON of a bench."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import peak
from bench.report import Report, Target, arguments, figures, pooled
from bench.server import ADDS_A_HEADER, serving
from bench.subjects import PEERS
from sharded_milter.testing import load


def test_a_target_says_whether_it_is_met() -> None:
    slow = Target("time", 12.34, 10, "ms")
    assert (slow.met, str(slow)) == (False, "time: 12.3 ms (target: at most 10 ms): missed")
    fast = Target("share", 0.95, 0.95, at_least=True)
    assert (fast.met, str(fast)) == (True, "share: 0.95 (target: at least 0.95): met")


def test_everything_that_is_printed_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("Is it fast?\n\n    python -m bench.fast\n")
    report.table("a table", [{"milter": "ours", "mails/s": 1234.5}, {"milter": "b", "mails/s": 2}])
    report.target(Target("ratio", 2.0, 1.0))
    report.save(tmp_path / "figures.json")
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved["question"] == "Is it fast?"
    assert saved["machine"].keys() == {"python", "system", "cores", "load", "commit"}
    assert saved["tables"]["a table"][0] == {"milter": "ours", "mails/s": 1234.5}
    assert saved["targets"][0]["met"] is False
    printed = capsys.readouterr().out
    for word in ("Is it fast?", "a table", "1,234", "ratio: 2 (target: at most 1): missed"):
        assert word in printed


def test_nothing_is_saved_without_a_path() -> None:
    Report(__doc__).save(arguments(__doc__).parse_args([]).json)


def test_a_process_has_used_memory() -> None:
    peak.reset(os.getpid())
    assert peak.of(os.getpid()) > 1_000_000


def test_every_peer_says_how_to_install_it() -> None:
    assert all(peer.install for peer in PEERS)
    assert len({peer.name for peer in PEERS}) == len(PEERS)


def test_pooled_runs_are_one() -> None:
    one = load.Result(1.0, [0.1, 0.2], {"accept": 2}, 0.5)
    two = load.Result(3.0, [0.3], {"reject": 1}, 0.5)
    both = pooled([one, two])
    assert (both.messages, both.seconds, both.verdicts) == (3, 4.0, {"accept": 2, "reject": 1})
    assert both.client_cpu == 1.0
    assert figures(both) == {
        "mails/s": 0.75, "p50 ms": 200, "p99 ms": 300, "client": "25%", "verdicts": "accept reject",
    }  # fmt: skip


@pytest.mark.parametrize("tcp", [True, False])
def test_the_real_server_answers(tcp: bool) -> None:
    with serving(ADDS_A_HEADER.format(ms=0), "--workers", "1", tcp=tcp) as server:
        assert load.run(server.path, 2, 4).verdicts == {"accept": 4}
        assert load.run(server.path, 1, 1, glued=False).verdicts == {"accept": 1}
