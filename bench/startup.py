"""How long until it serves, and what does importing the authors' names cost?

python -m bench.startup [--workers 2] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from bench.report import Report, Target, arguments
from bench.server import ADDS_A_HEADER, serving

# An author's tests import it again and again; half of what the interpreter itself takes or so.
IMPORT_AT_MOST_MS = 60.0

# A restart during which an MTA's connection attempts are refused.
READY_AT_MOST_S = 0.8


def seconds_of(code: str) -> float:
    """How long a fresh interpreter takes for it, from start to exit."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def ready(workers: int) -> float:
    """Seconds from the start of the process until a connection is taken."""
    began = time.perf_counter()
    with serving(ADDS_A_HEADER.format(ms=0), "--workers", str(workers)):
        return time.perf_counter() - began


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    report = Report(__doc__)
    rounds = range(options.rounds)
    nothing = median(seconds_of("pass") for _ in rounds)
    imported = median(seconds_of("import sharded_milter") for _ in rounds) - nothing
    served = median(ready(options.workers) for _ in rounds)
    row = {
        "python -c pass, ms": 1000 * nothing,
        "import sharded_milter, ms": 1000 * imported,
        f"ready with {options.workers} workers, s": served,
    }
    report.table(f"median of {options.rounds}", [row])
    report.target(Target("import sharded_milter", 1000 * imported, IMPORT_AT_MOST_MS, "ms"))
    report.target(Target("ready", served, READY_AT_MOST_S, "s"))
    report.save(options)


if __name__ == "__main__":
    main()
