"""A layer that grows or shrinks by 3 % a step: found within 60 steps, the right layer, and its healthy twin silent."""

from __future__ import annotations

import numpy as np
import pytest

from gradwatch.records import Finding
from tests.detectors import streams

ONSET = 150
SEEDS = range(10)


def run(seed: int, growth: float, *, layers: int = 6, spread: float = 0.25) -> dict[str, list[Finding]]:
    norms = streams.noisy(ONSET + 60, layers, seed=seed, spread=spread) * np.exp(-np.arange(ONSET + 60) / 400)[:, None]
    norms[ONSET:, 2] *= growth ** np.arange(60)
    return streams.alarms(streams.found(streams.batch(norms, loss=streams.falling(ONSET + 60, seed=seed))))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("growth", "rule"), [(1.03, "exploding"), (1 / 1.03, "vanishing")])
def test_three_percent_a_step_is_found_within_sixty(seed: int, growth: float, rule: str) -> None:
    alarms = run(seed, growth)
    assert list(alarms) == [rule]
    assert [finding.layers for finding in alarms[rule]] == [("layer2",)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_healthy_twin_is_silent(seed: int) -> None:
    assert not run(seed, 1.0)


def test_a_growing_drift_forecasts_its_overflow() -> None:
    facts = run(0, 1.03)["exploding"][0].evidence
    assert 18 < facts["doubling_steps"] < 30
    assert 2000 < facts["overflow_steps"] < 4500


def test_all_layers_together_do_not_drift() -> None:
    norms = streams.noisy(300, 6) * np.exp(-0.03 * np.arange(300))[:, None]
    assert not streams.alarms(streams.found(streams.batch(norms, loss=streams.falling(300))))


def test_a_drift_stays_one_finding_while_it_lasts() -> None:
    norms = streams.noisy(450, 6)
    norms[150:, 1] *= 1.03 ** np.arange(300)
    findings = streams.found(streams.batch(norms, loss=streams.falling(450)), ["exploding"])["exploding"]
    assert len(findings) == 1
    assert findings[0].is_open
