"""What a remedy is judged by: the findings that stand after it, and the course of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from gradwatch.actions import DecayLR, Reinitialize, Rollback, RunState
from gradwatch.actions.course import Course
from gradwatch.actions.trial import Trial
from gradwatch.records import ActionRecord, Finding, Severity

APPLIED, DEADLINE = 100, 160


def trial(*, severity: Severity = "warning", loss: float = 1.0, renews: bool = False) -> Trial:
    record = ActionRecord("a", APPLIED, "DecayLR", reason="exploding")
    return Trial("DecayLR", record, DEADLINE, severity, loss, renews)


def standing(rule: str = "exploding", *, severity: Severity = "warning", first_step: int = 90) -> Finding:
    return Finding(f"{rule}:{first_step}", rule, severity, first_step, first_step)


def state(loss: float = 1.0, first_loss: float = 2.0) -> RunState:
    return RunState(loss=loss, first_loss=first_loss)


@pytest.mark.parametrize(
    ("step", "findings", "verdict"),
    [
        (101, [standing()], ""),
        (DEADLINE - 1, [standing()], ""),
        (DEADLINE, [standing()], "no effect"),
        (101, [], "helped"),
        (101, [standing("plateau")], "helped"),
        (101, [standing("nonfinite", severity="critical", first_step=APPLIED)], "worse"),
        (101, [standing("nonfinite", severity="critical", first_step=APPLIED - 1)], "helped"),
        (101, [standing("nonfinite", severity="warning", first_step=APPLIED)], "helped"),
    ],
)
def test_a_remedy_is_judged_by_what_still_stands(step: int, findings: list[Finding], verdict: str) -> None:
    assert trial().verdict(step, findings, state()) == verdict


@pytest.mark.parametrize(
    ("step", "findings", "verdict"),
    [
        (101, [], ""),
        (DEADLINE - 1, [], ""),
        (DEADLINE, [], "helped"),
        (DEADLINE, [standing(first_step=APPLIED - 1)], "helped"),
        (125, [standing(first_step=106)], ""),
        (126, [standing(first_step=106)], "no effect"),
        (107, [standing(severity="critical", first_step=106)], "no effect"),
        (DEADLINE, [standing(first_step=DEADLINE - 1)], "no effect"),
    ],
)
def test_after_new_weights_only_a_finding_that_comes_back_counts(
    step: int, findings: list[Finding], verdict: str
) -> None:
    assert trial(renews=True).verdict(step, findings, state()) == verdict


@pytest.mark.parametrize(
    ("before", "after", "first", "verdict"),
    [
        (1.0, 3.0, 0.5, ""),
        (1.0, 3.01, 0.5, "worse"),
        (1.0, 5.9, 2.0, ""),
        (1.0, 6.1, 2.0, "worse"),
        (1.0, math.inf, 2.0, "worse"),
        (math.inf, math.inf, 2.0, ""),
    ],
)
def test_a_loss_above_three_times_its_level_means_worse(
    before: float, after: float, first: float, verdict: str
) -> None:
    assert trial(loss=before).verdict(101, [standing()], state(after, first)) == verdict


def test_without_a_loss_a_graver_finding_means_worse() -> None:
    unknown = trial(severity="warning", loss=math.nan)

    assert unknown.verdict(101, [standing(severity="critical")], state()) == "worse"
    assert unknown.verdict(101, [standing(severity="warning")], state()) == ""


def followed(losses: Sequence[float]) -> RunState:
    """What is known after these losses, one a step."""
    course, known = Course(), RunState()
    for loss in losses:
        course.take([loss], known)
    return known


def test_the_loss_is_the_median_of_the_last_nine_and_the_best_the_lowest_of_these() -> None:
    known = followed([9.0] * 20 + [1.0] * 9 + [4.0] * 5)

    assert (known.loss, known.best_loss) == (4.0, 1.0)
    assert followed([9.0] * 20 + [1.0] * 9 + [4.0] * 4).loss == 1.0


def test_the_first_loss_is_the_median_of_the_first_nine_but_not_above_the_very_first() -> None:
    assert followed([3.0, 2.0, 2.0, *[1.0] * 6]).first_loss == 1.0
    assert followed([1.0, *[50.0] * 20]).first_loss == 1.0
    assert followed([math.nan, 2.0]).first_loss == 2.0


@pytest.mark.parametrize(
    ("losses", "learns"),
    [
        ([2.0] * 60, False),
        ([2.0] * 30 + [0.9] * 9, True),
        ([2.0] * 26, False),
        ([2.0] * 18 + [1.85] * 9, True),
        ([2.0] * 18 + [1.95] * 9, False),
        ([2.0] * 17 + [1.85] * 9, False),
        ([1.0] * 9 + [20.0] * 40 + [15.0] * 9, False),
        ([2.0] * 30 + [math.nan] * 9, False),
    ],
)
def test_learning_is_a_loss_well_below_the_first_or_one_that_falls(losses: list[float], learns: bool) -> None:
    assert followed(losses).learns is learns


def test_losses_that_were_not_measured_change_nothing() -> None:
    assert followed([2.0, -math.inf, -math.inf]).loss == 2.0


def test_a_rate_is_lowered_to_the_least_factor_and_then_no_more() -> None:
    action, known = DecayLR(factor=0.1, min_factor=0.05), RunState()

    first = action.respond(standing(), 101, known)
    assert first is not None
    assert (first.before, first.after, first.lr_factor) == (1.0, 0.1, 0.1)
    known.lr_factor = 0.1
    second = action.respond(standing(), 200, known)
    assert second is not None
    assert second.lr_factor == 0.05
    known.lr_factor = 0.05
    assert action.respond(standing(), 300, known) is None


def test_the_way_back_begins_once_all_has_been_well_for_long_enough() -> None:
    action = DecayLR(recover=10, hold=50)
    known = RunState(lr_factor=0.5, well_since=100)

    assert action.recover(149, known) is None
    assert action.recover(150, known) is not None
    assert known.recovery == (150, 0.5)
    assert DecayLR(recover=10, hold=50).recover(500, RunState(lr_factor=0.5, well_since=None)) is None
    assert DecayLR().recover(500, RunState(lr_factor=0.5)) is None


def test_each_failed_rollback_goes_back_one_snapshot_further() -> None:
    due = Rollback(factor=0.5).respond(
        standing(severity="critical", first_step=90), 95, RunState(failures={"Rollback:exploding": 2})
    )

    assert due is not None
    assert (due.until_step, due.backs, due.lr_factor) == (90, 2, 0.5)


def test_a_rollback_waits_for_a_warning_to_stand_and_not_for_a_critical_finding() -> None:
    action = Rollback(patience=20)

    assert action.respond(standing(first_step=90), 109, RunState()) is None
    assert action.respond(standing(first_step=90), 110, RunState()) is not None
    assert action.respond(standing(severity="critical", first_step=90), 91, RunState()) is not None


@pytest.mark.parametrize(
    ("rule", "layers", "words"),
    [("dead", ("a", "b"), "layers a, b initialised again"), ("vanishing", (), "all layers initialised again")],
)
def test_new_weights_go_to_dead_layers_alone_and_to_all_where_the_signal_fades(
    rule: str, layers: tuple[str, ...], words: str
) -> None:
    finding = Finding(f"{rule}:90", rule, "critical", 90, 90, layers=("a", "b"))

    due = Reinitialize().respond(finding, 101, RunState())

    assert due is not None
    assert (due.layers, due.detail.partition(" (")[0]) == (layers, words)


def test_a_rollback_never_raises_the_rate_and_keeps_it_with_factor_one() -> None:
    grave = standing(severity="critical")

    kept = Rollback(factor=1.0).respond(grave, 101, RunState(lr_factor=0.3))
    floor = Rollback(factor=0.5, min_factor=0.4).respond(grave, 101, RunState(lr_factor=0.3))
    assert kept is not None
    assert floor is not None
    assert (kept.lr_factor, floor.lr_factor) == (0.3, 0.3)
