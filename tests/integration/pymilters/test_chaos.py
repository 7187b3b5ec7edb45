"""Badly behaving MTAs, and a script whose workers are killed."""

import pytest

from bench.chaos.plan import Combination, run

from .scripts import Environment

pytestmark = pytest.mark.integration

MESSAGES = 300


def test_every_answer_is_of_its_own_message(environment: Environment) -> None:
    combination = Combination("pymilter", "kills", "unix")
    outcome = run(combination, MESSAGES, "tests", python=str(environment.python))
    assert outcome.failures == []
    assert outcome.account.counts["messages"] == MESSAGES
    assert outcome.troubles["kills"] > 0
