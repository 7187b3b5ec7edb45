"""Generated runs against real worker processes: each job gets its own answer, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .real import RETRIES

ROOT = Path(__file__).parents[2]
RUNS = 200
LONGEST = 100.0  # seconds; it takes a fifth of that on two cores


@pytest.mark.integration
def test_every_job_is_answered_by_real_workers(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.touch()
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.real", str(RUNS), "1", str(scans)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failures"] == []
    assert report["wrong"] == []
    ends = report["ends"]
    assert sum(ends.values()) == report["numbers"]
    assert ends["answers"] > RUNS
    assert ends["raises"]
    assert ends["exits"]
    assert report["kills"]
    assert report["attempts"] == report["ended"]
    assert report["queued"] == report["shards"] == 0
    times = Counter(scans.read_text().split())
    # Each kill may cost any scan one attempt; what is taken over may begin twice.
    most = 1 + RETRIES + report["kills"] + 1
    assert max(times.values()) <= most
    assert sum(times.values()) <= report["attempts"]
