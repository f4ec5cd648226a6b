"""What each remedy answers to a finding, by what is known of the run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gradwatch.actions import DecayLR, Ladder, RaiseLR, Reinitialize, Restructure, Rollback
from gradwatch.actions.base import RunState
from gradwatch.actions.course import Course, take_rates
from gradwatch.actions.policy import Policy
from gradwatch.errors import ConfigurationError
from gradwatch.records import Finding
from tests.actions.test_policy import acts, episodes, sick


def followed(losses: list[float]) -> RunState:
    """The state of a run that had these losses."""
    state = RunState()
    course = Course()
    for loss in losses:
        course.take([loss], state)
    return state


def factor_of(action: Any, finding: Finding, state: RunState | None = None, step: int = 200) -> float | None:
    due = action.respond(finding, step, state or RunState())
    return None if due is None else due.lr_factor


# -- DecayLR and the way back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "factor"), [(0.012, 0.3), (0.5, 0.02), (0.0, 0.3)])
def test_updates_that_are_far_too_large_lower_the_rate_by_as_much(ratio: float, factor: float) -> None:
    finding = sick("update_ratio", evidence={"ratio": ratio})

    assert factor_of(DecayLR(factor=0.3), finding) == pytest.approx(factor)


def test_a_loss_above_where_it_began_is_rolled_back_rather_than_waited_out() -> None:
    finding = sick("update_ratio", step=1)
    decided = []
    for loss in (1.0, 9.0):
        policy = Policy(Ladder([DecayLR(), Rollback(on="update_ratio")]))
        due = policy.decide(3, [finding], [1.0, loss, loss])
        decided.append(due.action.name if due else "")

    assert decided == ["DecayLR", "Rollback"]


def test_without_a_rollback_a_smaller_rate_is_better_than_nothing() -> None:
    due = Policy([DecayLR()]).decide(3, [sick("update_ratio", step=1)], [1.0, 9.0, 9.0])

    assert due is not None
    assert due.action.name == "DecayLR"


def test_the_way_back_of_the_rate_is_given_up_when_the_loss_rises_again() -> None:
    policy = Policy([DecayLR(factor=0.1, recover=100, hold=20, within=5)])
    acts(policy, range(1, 12), loss=2.0)
    acts(policy, range(12, 60), episodes(12), loss=0.2)
    on_the_way = policy.state.lr_factor

    done = acts(policy, range(60, 120), loss=0.9)

    assert 0.1 < on_the_way < 1.0
    assert len(done) == 1
    assert policy.state.lr_factor == 0.1


# -- RaiseLR -----------------------------------------------------------------------------------------------------------


STALL = {"cause_id": "learning_rate_small", "ratio": 1e-7, "everywhere": True}


def test_a_run_that_stands_still_gets_the_rate_that_moves_it_as_usual() -> None:
    assert factor_of(RaiseLR(), sick("stall", evidence=STALL)) == pytest.approx(1e4)
    assert factor_of(RaiseLR(max_factor=50.0), sick("stall", evidence=STALL)) == 50.0
    assert factor_of(RaiseLR(), sick("stall", evidence=STALL), RunState(lr_factor=0.1)) == pytest.approx(1e3)


@pytest.mark.parametrize(
    ("evidence", "learns"),
    [
        ({**STALL, "cause_id": "init_small"}, False),
        ({**STALL, "everywhere": False}, False),
        ({**STALL, "ratio": 0.0}, False),
        ({**STALL, "ratio": 0.01}, False),
        (STALL, True),
    ],
)
def test_a_rate_is_not_raised_where_it_is_not_the_cause_or_something_is_learnt(
    evidence: dict[str, Any], *, learns: bool
) -> None:
    assert factor_of(RaiseLR(), sick("stall", evidence=evidence), RunState(learns=learns)) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": 0.5}, "'target' must be <= 0.01: 0.5"),
        ({"max_factor": 0.5}, "'max_factor' must be > 1: 0.5"),
        ({"target": 0.0}, "'target' must be a finite number > 0: 0.0"),
    ],
)
def test_arguments_of_a_raised_rate_are_checked(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RaiseLR(**arguments)


# -- Rollback ----------------------------------------------------------------------------------------------------------


def test_the_first_leap_of_the_loss_tells_how_much_too_high_the_rate_is() -> None:
    state = followed([1.0, 1.1, 1.0, 9.0, 9e9])

    assert state.growth == pytest.approx(9.0)
    assert factor_of(Rollback(), sick("divergence", step=199), state) == pytest.approx(1 / (1 + math.sqrt(9.0)))


@pytest.mark.parametrize(("before", "now", "factor"), [(0.1, 0.1, 0.5), (0.1, 10.0, 0.005), (0.1, 0.15, 0.5)])
def test_a_rollback_goes_on_from_the_rate_at_the_snapshot_where_it_has_risen(
    before: float, now: float, factor: float
) -> None:
    state = RunState()
    take_rates(100, [before] * 100, state)
    take_rates(103, [now] * 3, state)

    assert factor_of(Rollback(), sick("divergence", step=102), state) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("skipped", "step", "is_due"), [("nonfinite", 30, False), ("nonfinite", 80, True), ("grad_scaler", 999, False)]
)
def test_skipped_steps_are_borne_with_for_longer(skipped: str, step: int, is_due: bool) -> None:
    finding = sick("nonfinite", severity="warning", evidence={"skipped": skipped})

    assert (factor_of(Rollback(patience=20), finding, step=step) is not None) == is_due


@pytest.mark.parametrize(
    ("cause", "first_step", "is_due"),
    [
        ("killed_units", 150, True),
        ("learning_rate", 150, True),
        ("dying_relu", 150, False),
        ("killed_units", 90, False),
    ],
)
def test_units_that_steps_killed_come_back_with_the_weights_before(
    cause: str, first_step: int, *, is_due: bool
) -> None:
    finding = sick("dead", step=first_step, evidence={"cause_id": cause})

    assert factor_of(Rollback(), finding, RunState(began=100)) == (0.1 if is_due else None)


# -- Reinitialize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "times", "factor"),
    [("layer_scale", {}, 1.0), ("killed_units", {}, 0.03), ("init_large", {"Reinitialize": 1}, 0.03)],
)
def test_new_weights_get_a_lower_rate_where_it_was_the_cause_or_they_fell_sick_before(
    cause: str, times: dict[str, int], factor: float
) -> None:
    state = RunState(lr_factor=0.3, times=times)

    assert factor_of(Reinitialize(), sick("dead", evidence={"cause_id": cause}), state) == pytest.approx(factor)


@pytest.mark.parametrize(("cause", "is_due"), [("init_small", True), ("layer_scale", True), ("rate_zero", False)])
def test_a_stall_calls_for_new_weights_only_where_they_are_the_cause(cause: str, is_due: bool) -> None:
    finding = sick("stall", evidence={"cause_id": cause})

    assert (factor_of(Reinitialize(on="stall"), finding) is not None) == is_due


def test_weights_that_have_learnt_are_not_given_up_for_steps_that_were_skipped() -> None:
    finding = sick("nonfinite", severity="warning", evidence={"skipped": "nonfinite"})

    assert factor_of(Reinitialize(), finding, followed([1.0] * 9 + [0.7] * 80)) is None
    assert factor_of(Reinitialize(), finding, followed([1.0] * 89)) == 1.0


def test_a_loss_that_only_fell_from_a_bad_start_is_not_learning() -> None:
    wrecked = followed([2.3, 40.0, 30.0, 20.0, *[2.3] * 100])

    assert (wrecked.first_loss, wrecked.learns) == (2.3, False)
    assert followed([2.3 * 0.99**step for step in range(100)]).learns


def test_new_weights_have_learnt_once_they_are_better_than_those_given_up() -> None:
    state, course = followed([2.3] * 20), Course()
    course.begin_anew(state)
    learns = []
    for loss in (*[8.0] * 9, *[2.28] * 80, *[2.1] * 60):
        course.take([loss], state)
        learns.append(state.learns)

    assert (learns[80], learns[-1]) == (False, True)


@pytest.mark.parametrize("action", [Reinitialize(), Restructure()])
@pytest.mark.parametrize("cause", ["half_overflow", "gradients_not_cleared", "weight_decay"])
def test_weights_are_not_given_up_for_what_others_would_suffer_from_too(action: Any, cause: str) -> None:
    assert factor_of(action, sick("nonfinite", evidence={"cause_id": cause})) is None


def test_the_rate_factor_of_new_weights_is_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"'factor' must be <= 1: 2.0"):
        Reinitialize(factor=2.0)


# -- the policy --------------------------------------------------------------------------------------------------------


def test_a_critical_finding_of_another_kind_ends_a_trial_as_worse() -> None:
    policy = Policy(Ladder([Reinitialize(confirm=0), Rollback()]))

    done = acts(policy, range(11, 60), {11: sick("dead"), 15: sick("divergence", step=14)})

    assert done == ["11 Reinitialize", "15 Rollback"]
    assert policy.take_news()[0].outcome == "worse"


def test_nothing_else_is_done_while_what_cures_the_gravest_waits_to_be_sure() -> None:
    policy = Policy(Ladder([DecayLR(), Reinitialize(confirm=30)]))
    cause = {"cause_id": "init_large"}

    done = acts(
        policy,
        range(1, 40),
        {1: sick("exploding", step=1, evidence=cause), 3: sick("update_ratio", step=2, severity="warning")},
    )

    assert done[0] == "11 Reinitialize"


@pytest.mark.parametrize(("cause", "first"), [("activation", "Restructure"), ("init_large", "Reinitialize")])
def test_an_activation_that_overflows_is_replaced_before_weights_are_given_up(cause: str, first: str) -> None:
    policy = Policy(Ladder([Reinitialize(confirm=0), Restructure(changes=("activation",), confirm=0)]))

    done = acts(policy, range(11, 13), {11: sick("nonfinite", evidence={"cause_id": cause})})

    assert done == [f"11 {first}"]


@pytest.mark.parametrize(("listed", "said"), [(Ladder, ["GiveUp"]), (list, [])])
def test_a_ladder_says_once_that_it_can_do_nothing(listed: Any, said: list[str]) -> None:
    policy = Policy(listed([DecayLR(on="exploding")]))

    acts(policy, range(1, 700), {10: sick("underflow", severity="warning")})

    assert [record.action for record in policy.take_news()] == said


def test_a_rollback_to_the_start_is_not_worse_for_its_loss() -> None:
    policy = Policy([Rollback(within=30)])
    acts(policy, range(1, 2), loss=20.0)
    acts(policy, range(2, 41), {40: sick("divergence", step=40)}, loss=2.3)

    acts(policy, range(41, 72), loss=20.0)

    assert policy.take_news()[0].outcome == "helped"
