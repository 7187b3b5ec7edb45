"""The model, in as many runs as the suite has time for; MODEL_SECONDS asks for longer."""

from __future__ import annotations

import os
import time

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import Machine

# Examples in one round, and for how long rounds go on, seconds; one is made in any case.
EXAMPLES = 250
SECONDS = float(os.environ.get("MODEL_SECONDS", "0"))


def test_the_rules_hold() -> None:
    end = time.monotonic() + SECONDS
    first = time.time_ns() if SECONDS else 0
    for number in range(first, first + 1_000_000):
        run_state_machine_as_test(
            seed(number)(type("Machine", (Machine,), {})),
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        if time.monotonic() >= end:
            return
