"""The simulation of dispatch: it answers everything once, and its ideal queue is the known one."""

from __future__ import annotations

import json
from math import factorial
from pathlib import Path
from statistics import fmean

import pytest

from bench import simulate
from bench.ideal_queue import Ideal
from bench.simulate import QUICK, SCENARIOS, simulated
from bench.simulated_loads import Load, Scans, Scenario, plan
from bench.simulated_master import Master
from bench.simulated_time import HOP, MASTER_CPU, Question

DEADLY = Scenario(4, Scans(0.01), load=0.5, jobs=400, poison=0.01, innocent=0.02)


def asked(scenario: Scenario, system: Master | Ideal) -> list[Question]:
    """All questions of a scenario, answered by that system."""
    conversations = plan(scenario, seed=1)
    questions = [question for each in conversations for question in each.questions]
    if isinstance(system, Master):
        system.questions += questions
    Load(scenario, system, conversations).run()
    return questions


def erlang_c(servers: int, load: float) -> float:
    """The share of jobs that wait in an M/M/k queue."""
    offered = servers * load
    full = offered**servers / factorial(servers) / (1 - load)
    return full / (full + sum(offered**n / factorial(n) for n in range(servers)))


@pytest.mark.parametrize("scenario", [*QUICK, DEADLY], ids=lambda each: each.name)
def test_every_job_is_answered_once(scenario: Scenario) -> None:
    master = Master(scenario.shards, scenario.limits, objects=scenario.objects)
    questions = asked(scenario, master)
    assert {question.answers for question in questions} == {1}
    assert all(question.wait > 0 for question in questions if not question.failed)
    assert not any(question.failed for question in questions) or scenario.poison
    counts = master.dispatcher.counters
    ends = ("answered", "lost", "superseded", "withdrawn")
    ended = sum(counts[f"attempts_{name}"] for name in ends)
    assert ended <= counts["attempts"] <= ended + 2 * scenario.shards  # some may yet be in hand


def test_workers_die_of_what_is_deadly_only() -> None:
    master = Master(DEADLY.shards, DEADLY.limits, objects=False)
    questions = asked(DEADLY, master)
    deaths = [question.deaths for question in plan_of(DEADLY)]
    assert master.dispatcher.counters["workers_lost"] == sum(deaths) > 0
    assert [question.failed for question in questions] == [count == 2 for count in deaths]


def plan_of(scenario: Scenario) -> list[Question]:
    return [question for each in plan(scenario, seed=1) for question in each.questions]


def test_the_ideal_queue_is_the_one_of_the_textbook() -> None:
    mean, servers, load = 0.1, 4, 0.6
    scenario = Scenario(servers, Scans(mean, "exponential"), load=load, jobs=40_000)
    waits = [question.wait for question in asked(scenario, Ideal(servers))]
    expected = erlang_c(servers, load) * mean / (servers * (1 - load))
    assert fmean(waits) - 2 * HOP - 2 * MASTER_CPU == pytest.approx(expected, rel=0.04)
    behind = sum(wait > 3 * HOP + 2 * MASTER_CPU for wait in waits) / len(waits)
    assert behind == pytest.approx(erlang_c(servers, load), rel=0.04)


def test_the_same_seed_gives_the_same_figures() -> None:
    scenario = QUICK[0]
    assert simulated(scenario, 1) == simulated(scenario, 1) != simulated(scenario, 2)


def test_the_table_has_all_that_was_asked_for() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    assert {each.shards for each in SCENARIOS} == {2, 8, 64, 512}
    assert {each.scans.mean for each in SCENARIOS} == {0.001, 0.01, 0.1, 1.0}
    assert {each.scans.law for each in SCENARIOS} == {"constant", "lognormal", "pareto"}
    assert {each.load for each in SCENARIOS} == {0.5, 0.8, 0.95, 0.0}
    assert any(each.scans.slow for each in SCENARIOS)
    assert {bool(each.zipf) for each in SCENARIOS if each.keys} == {True, False}
    assert any(each.objects and not each.load for each in SCENARIOS)
    assert any(each.light for each in SCENARIOS)
    assert any(each.poison for each in SCENARIOS)
    assert any(each.innocent for each in SCENARIOS)
    assert any(each.limits.max_messages for each in SCENARIOS)


def test_the_bench_prints_each_figure_beside_its_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["simulate", "--quick", "--only", "slow", "--json", str(path)])
    simulate.main()
    name = QUICK[1].name
    printed = capsys.readouterr().out
    assert f"{name}: rate / ideal: " in printed
    assert "targets met in 1 scenarios" in printed
    assert json.loads(path.read_text())["targets"][0]["what"] == f"{name}: rate / ideal"
