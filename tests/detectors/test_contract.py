"""What every built-in rule must do: pure, restartable, blind to scale, polite about bad thresholds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.catalogue import CATALOGUE
from gradwatch.detectors.engine import Engine, replay
from gradwatch.errors import ConfigurationError
from gradwatch.records import RULES, Finding, StepBatch
from tests import strategies
from tests.detectors import streams

EVERY_RULE = pytest.mark.parametrize("rule", sorted(CATALOGUE))


def eventful(seed: int) -> StepBatch:
    """A run in which most rules have something to say."""
    rng = np.random.default_rng(seed)
    steps, layers = 160, 8
    norms = streams.noisy(steps, layers, seed=seed)
    norms[:, :3] *= np.geomspace(1e-9, 1e-5, 3)
    norms[60:, 5] *= 1.04 ** np.arange(100)
    norms[90], norms[100:104, 2] = norms[90] * 500, 0.0
    norms[120, 4] = np.nan
    norms[140:] = 0.0
    loss = np.where(np.arange(steps) < 80, 2.0, 2.0 * 1.1 ** (np.arange(steps) - 80)) + rng.normal(0, 0.01, steps)
    loss[130] = np.inf
    samples = steps // 10
    return streams.batch(
        norms,
        loss=loss,
        lr=np.geomspace(1e-4, 1.0, steps),
        statistics={
            "weight_norm": np.ones((samples, layers)),
            "update_ratio": np.geomspace(1e-9, 0.9, samples)[:, None] * np.ones(layers),
            "zero_fraction": np.full((samples, layers), 0.7),
            "saturated_fraction": np.full((samples, 1), 0.95),
            "dead_fraction": np.full((samples, 1), 0.95),
        },
        modules=["act"],
        parameters=streams.chain(layers, dtype="float16"),
    )


def findings(steps: StepBatch, cuts: list[int], detectors: Any = "default") -> list[dict[str, Any]]:
    """All that was reported, in order, the steps cut at these places."""
    engine = Engine(detectors, RunContext(steps.parameters))
    places = sorted({0, len(steps), *(cut for cut in cuts if cut < len(steps))})
    told: list[Finding] = []
    for start, stop in itertools.pairwise(places):
        told += engine.update(steps[start:stop])
    return [finding.to_json() for finding in [*told, *engine.open_findings]]


def test_every_rule_of_the_record_has_a_detector() -> None:
    assert set(CATALOGUE) == set(RULES)


@EVERY_RULE
def test_config_is_json_and_builds_an_equal_rule(rule: str) -> None:
    made = CATALOGUE[rule]()
    config = json.loads(json.dumps(made.config()))
    assert CATALOGUE[rule](**config).config() == made.config()


@EVERY_RULE
def test_documentation_names_every_threshold(rule: str) -> None:
    documentation = CATALOGUE[rule].__doc__ or ""
    missing = [f.name for f in dataclasses.fields(CATALOGUE[rule]) if f"{f.name}:" not in documentation]
    assert not missing
    assert "False alarms" in documentation


@EVERY_RULE
@pytest.mark.parametrize("value", [math.nan, -1.0, "high"])
def test_a_nonsense_threshold_is_refused_by_name(rule: str, value: object) -> None:
    name = dataclasses.fields(CATALOGUE[rule])[0].name
    with pytest.raises(ConfigurationError, match=f"'{name}' must be"):
        CATALOGUE[rule](**{name: value})  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 5), cuts=st.lists(st.integers(1, 159), max_size=12))
def test_findings_do_not_depend_on_how_the_steps_are_cut(seed: int, cuts: list[int]) -> None:
    steps = eventful(seed)
    assert findings(steps, cuts) == findings(steps, [])


@settings(max_examples=60, deadline=None)
@given(steps=strategies.step_batches(), cuts=st.lists(st.integers(1, 11), max_size=3))
def test_any_record_is_taken_and_cut_at_will(steps: StepBatch, cuts: list[int]) -> None:
    assert findings(steps, cuts) == findings(steps, [])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 5), stop=st.integers(1, 159))
def test_a_restored_engine_goes_on_as_if_nothing_had_happened(seed: int, stop: int) -> None:
    steps = eventful(seed)
    context = RunContext(steps.parameters)
    straight, first, second = (Engine("default", context) for _ in range(3))
    straight.update(steps[:stop])
    first.update(steps[:stop])
    second.load_state_dict(first.state_dict())
    expected = [finding.to_json() for finding in straight.update(steps[stop:])]
    assert [finding.to_json() for finding in second.update(steps[stop:])] == expected


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 5), power=st.integers(-20, 20))
def test_scaling_all_gradients_changes_no_verdict(seed: int, power: int) -> None:
    steps = eventful(seed)
    scaled = dataclasses.replace(steps, grad_norm=steps.grad_norm * np.float32(2.0**power))

    def verdicts(of: StepBatch) -> list[Any]:
        told = replay([of], Engine("default", RunContext(of.parameters)))
        return [(f.id, f.severity, f.last_step, sorted(f.layers), f.resolved_step) for f in told]

    assert verdicts(scaled) == verdicts(steps)


def test_state_is_arrays_and_json() -> None:
    def check(value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                assert isinstance(key, str)
                check(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item)
        else:
            assert value is None or isinstance(value, (bool, int, float, str, np.ndarray)), type(value)

    engine = Engine("default", RunContext(eventful(0).parameters))
    engine.update(eventful(0))
    check(engine.state_dict())


def test_most_rules_speak_in_the_eventful_run() -> None:
    """Guards the laws above: they would hold of detectors that see nothing."""
    rules = {finding["rule"] for finding in findings(eventful(0), [])}
    assert len(rules) >= 9, rules


@EVERY_RULE
def test_a_rule_alone_finds_what_it_finds_in_company(rule: str) -> None:
    steps = eventful(1)
    alone = CATALOGUE[rule]()
    alone.start(RunContext(steps.parameters))
    told = alone.update(steps)
    together = Engine([rule], RunContext(steps.parameters)).update(steps)
    assert [f.id for f in told] == [f.id for f in together]
    assert [f.message for f in told] == [f.message for f in together]
