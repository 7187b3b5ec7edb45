"""The machine finds each mistake of `mutants`, so it would find the like of them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import directed
from .mutants import MUTANTS, Mutant
from .records import Broken

# Examples that may pass before the one that fails. Most need a few dozen; which they are depends on
# the modules that are loaded, from which Hypothesis takes constants.
EXAMPLES = 3000


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_mistake_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)

    machine = directed(*MUTANTS[mutant])
    with pytest.raises((Broken, AssertionError)):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=30,
                derandomize=True,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
