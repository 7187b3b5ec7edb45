"""Mail passes a real Postfix with each side. By itself, as it finds the harness by its path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
def test_every_side_takes_mail() -> None:
    options = ["--mtas", "Postfix", "--ms", "0", "--rounds", "1", "--seconds", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.through_postfix", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "skipped: Postfix" in done.stdout:
        pytest.skip(done.stdout)
    lines = [line.split() for line in done.stdout.splitlines()]
    sides = {words[0] for words in lines if len(words) > 5}
    assert {"no", "sharded-milter"} <= sides
