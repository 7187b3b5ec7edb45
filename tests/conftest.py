"""Makes the modules beside this one and the benches importable, and shares tests out.

`pytest -n 2` needs nothing else: each process has its own MTAs, sockets and directories.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(1, str(Path(__file__).parents[1]))

#: An example may take long on a busy machine, and no test asserts a time.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")

#: Slow tests that share nothing with their neighbours: any process may take any of them, so that
#: none has much left to do when the others have ended.
SPREAD = (
    "tests/faults/",
    "tests/cli/test_bench_and_tune.py",
    "tests/integration/test_bad_input.py",
    "tests/integration/test_lost_workers.py",
    "tests/integration/pymilters/test_bad_scripts.py",
    "tests/integration/pymilters/test_everything.py",
    "tests/integration/pymilters/test_side_by_side.py",
)


def pytest_collection_finish() -> None:
    """Modules and tests stay: tests that collect garbage need not look at them each time."""
    gc.collect()
    gc.freeze()


def scope_of(nodeid: str) -> str:
    """What runs in one process: a module, whose tests share daemons, or a test."""
    return nodeid if nodeid.startswith(SPREAD) else nodeid.split("::", 1)[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of pytest-xdist, where several processes were asked for and no other way to share."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling  # only then it is sure to be installed

    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = scope_of
    return scheduling
