import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.casework.case import Outcome
from benchmarks.casework.labels import CLASSES
from benchmarks.casework.networks import sequential
from benchmarks.casework.outcome import judge, range_test_failure
from benchmarks.casework.published import DIRECTORY, published_cases
from benchmarks.casework.scenarios import SCENARIOS
from benchmarks.casework.scenarios.base import blow_up_from_best
from benchmarks.casework.suites import all_cases, half
from benchmarks.casework.training import train
from gradwatch.diagnosis import CAUSES
from gradwatch.records import RULES

QUICK = {case.id: case for case in published_cases() if case.id in ("ips-15", "quad-edge-1.05", "so-34311586-buggy")}


def observed(name: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((DIRECTORY / f"{name}.json").read_text())["observed"]
    return found


@pytest.mark.parametrize("name", QUICK)
def test_a_published_case_fails_when_it_was_observed_to_fail(name: str) -> None:
    outcomes = [train(QUICK[name], seed).outcome for seed in observed(name)["seeds"]]
    assert [-1 if o.failure_step is None else o.failure_step for o in outcomes] == observed(name)["failure_step"]
    assert all(outcome.failed for outcome in outcomes)


def test_a_seed_gives_the_same_losses_again() -> None:
    first, second = (train(QUICK["quad-edge-1.05"], 3).losses for _ in range(2))
    assert np.array_equal(first, second, equal_nan=True)


def test_a_watched_training_has_the_losses_of_an_unwatched_one(tmp_path: Path) -> None:
    watched = train(QUICK["so-34311586-buggy"], 0, run_dir=tmp_path / "run")
    assert np.array_equal(watched.losses, train(QUICK["so-34311586-buggy"], 0).losses)


def test_a_layer_list_becomes_ordinary_modules() -> None:
    dense = {"t": "dense", "n": 3, "act": "relu", "w": "he_uniform", "b": "zeros"}
    conv = {"t": "conv", "n": 2, "k": 3, "act": "tanh", "w": "glorot_uniform", "b": "zeros", "pad": "same"}
    layers: list[dict[str, Any]] = [conv, {"t": "maxpool", "k": 2}, {"t": "flatten"}, dense]
    model, penalised = sequential(layers, (1, 8, 8))
    assert [type(module).__name__ for module in model.children()] == [
        "Conv2d", "Tanh", "MaxPool2d", "Flatten", "Linear", "ReLU",
    ]  # fmt: skip
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 3)
    assert penalised == []


def test_a_loss_above_ten_times_the_first_is_the_failure() -> None:
    assert judge(np.array([1.0, 2.0, 11.0, 12.0]), constant=100.0).failure_step == 2


def test_a_loss_that_is_not_finite_is_the_failure() -> None:
    outcome = judge(np.array([1.0, 0.5, math.nan]), constant=100.0)
    assert (outcome.failed, outcome.failure_step) == (True, 2)


def test_a_final_loss_near_the_best_constant_is_stuck() -> None:
    assert judge(np.full(40, 0.95), constant=1.0).stuck
    assert not judge(np.linspace(1.0, 0.1, 40), constant=1.0).failed


def test_a_range_test_ends_where_the_smoothed_loss_is_four_times_its_best() -> None:
    losses = np.concatenate([np.full(30, 1.0), np.full(5, 3.9), np.full(5, 4.1)])
    assert range_test_failure(losses) == 35


def test_a_blow_up_from_the_best_must_last() -> None:
    losses = np.concatenate([np.linspace(2.0, 0.05, 50), [0.9], np.full(10, 0.05), np.full(10, 0.9)])
    assert blow_up_from_best(losses) == 61


def test_an_outcome_without_failure_step_that_failed_is_stuck() -> None:
    assert Outcome(True, None, 10, 1.0, 1.0).stuck
    assert not Outcome(True, 5, 10, 1.0, 1.0).stuck


def test_the_scenarios_are_many_faulty_and_healthy() -> None:
    faulty = sum(case.faulty for case in SCENARIOS.values())
    assert faulty >= 40
    assert len(SCENARIOS) - faulty >= 40


def test_every_faulty_scenario_names_rules_and_causes_that_exist() -> None:
    for case in SCENARIOS.values():
        assert set(case.rules) <= set(RULES), case.id
        assert set(case.causes) <= {*CAUSES, "gradients_not_cleared"}, case.id
        assert bool(case.rules) == case.faulty, case.id


def test_every_rule_names_a_class_of_fault() -> None:
    assert {*CLASSES, "imbalance"} == set(RULES)


def test_the_halves_share_no_case_and_miss_none() -> None:
    cases = all_cases()
    dev, held = ({case.id for case in half(cases, which)} for which in ("dev", "held"))
    assert dev.isdisjoint(held)
    assert len(dev | held) == len(cases)
