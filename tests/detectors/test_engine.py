"""The engine: what it takes, what it refuses, own rules, failures, growth, replay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.catalogue import CATALOGUE
from gradwatch.detectors.engine import Engine, replay
from gradwatch.detectors.growth import Spike
from gradwatch.detectors.rule import Rule
from gradwatch.detectors.silent import Dead
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import Finding, Parameter, StepBatch
from tests.detectors import streams


def loud(batch: StepBatch) -> Iterable[Finding]:
    """Own rule: a finding for each loss above 100."""
    loss = batch.metric("loss")
    for step in batch.step[loss > 100].tolist():
        yield Finding(f"loud-{step}", "loud", "warning", step, step, message="too loud")


def context(layers: int = 3) -> RunContext:
    return RunContext(streams.chain(layers))


def test_default_is_every_rule() -> None:
    assert Engine("default", context()).names == list(CATALOGUE)


def test_rules_may_be_given_by_name_class_instance_and_function() -> None:
    engine = Engine(["nonfinite", Spike, Dead(patience=5), loud], context())
    assert engine.names == ["nonfinite", "spike", "dead", "loud"]


def test_an_unknown_rule_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="unknown rule 'explodng'; did you mean 'exploding'"):
        Engine(["explodng"], context())


@pytest.mark.parametrize("wrong", [3, int, None])
def test_what_is_no_detector_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="'detectors' must be rule names"):
        Engine([wrong], context())


def test_an_own_function_reports_through_the_engine() -> None:
    loss = np.ones(20)
    loss[12] = 500
    found = Engine([loud], context()).update(streams.batch(streams.noisy(20, 3), loss=loss))
    assert [finding.id for finding in found] == ["loud-12"]


def test_a_config_builds_the_same_engine_without_the_users_own_rules() -> None:
    engine = Engine([Spike(ratio=7.0), loud], context())
    again = Engine.from_config(engine.config(), context())
    assert again.config()["detectors"] == [engine.config()["detectors"][0]]


def broken(batch: StepBatch) -> Iterable[Finding]:
    raise RuntimeError("mine")


class Cracked(Rule):
    """A rule that fails at step 5."""

    rule = "cracked"
    rules = ("cracked",)

    def look(self, now: Any) -> None:
        if now.step == 5:
            raise RuntimeError("cracked")

    def words(self, finding: Finding) -> str:
        return ""


@pytest.mark.parametrize("detector", [broken, Cracked])
def test_a_failing_detector_raises_without_a_handler(detector: Any) -> None:
    with pytest.raises(RuntimeError):
        Engine([detector], context()).update(streams.batch(streams.noisy(9, 3)))


@pytest.mark.parametrize("detector", [broken, Cracked])
def test_a_failing_detector_is_switched_off_and_the_others_go_on(detector: Any) -> None:
    norms, failures = streams.noisy(40, 3), []
    norms[30] = np.nan
    engine = Engine([detector, "nonfinite"], context())
    found = [
        finding
        for part in streams.batch(norms).split(3)
        for finding in engine.update(part, on_error=lambda name, error: failures.append((name, str(error))))
    ]
    assert len(failures) == 1
    assert {finding.rule for finding in found} == {"nonfinite"}


def test_a_run_may_gain_a_layer_in_between() -> None:
    """The baselines of the old layers go with them to their new places."""
    old = streams.chain(3)
    late = Parameter("adapter.weight", shape=(4, 4), depth=1)
    engine = Engine("default", RunContext(old))
    engine.update(streams.batch(streams.noisy(100, 3) * [1, 10, 100], parameters=old))
    wider = streams.noisy(60, 4, seed=1) * [1, 10, 100, 5]
    wider[40] *= 1000
    found = engine.update(streams.batch(wider, parameters=(*old, late), first=100))
    assert {finding.rule for finding in found if finding.severity != "info"} == {"spike"}
    assert set(found[0].layers) == {"layer0", "layer1", "layer2", "adapter"}


def test_replay_gives_the_last_state_of_each_finding() -> None:
    norms = streams.noisy(200, 3)
    norms[80:90], norms[150:] = norms[80:90] * 300, norms[150:] * 300
    steps = streams.batch(norms)
    findings = [f for f in replay(steps.split(11), Engine(["exploding"], context())) if f.rule == "exploding"]
    assert [(f.first_step, f.last_step, f.is_open) for f in findings] == [(80, 89, False), (150, 199, True)]


def test_an_enduring_condition_is_reported_ever_more_rarely() -> None:
    norms = streams.noisy(2000, 3)
    norms[50:, 1] = 0.0
    told = Engine(["dead"], context()).update(streams.batch(norms))
    assert 3 <= len(told) <= 12


def test_a_state_of_other_detectors_is_refused() -> None:
    state = Engine(["spike"], context()).state_dict()
    with pytest.raises(ConfigurationError, match="'state' must be of detectors"):
        Engine(["dead"], context()).load_state_dict(state)
