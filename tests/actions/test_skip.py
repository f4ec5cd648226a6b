"""Which steps `SkipStep` leaves out, from the norms alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gradwatch.actions import SkipStep


def skipped(action: SkipStep, norms: Sequence[float]) -> list[bool]:
    """Whether each step of a run with these global norms is skipped."""
    state: tuple[Any, ...] = action.initial_state()
    found = []
    for norm in norms:
        decision = action.decide(np.array([norm]), state, np)
        state = decision.state
        found.append(bool(decision.skip))
    return found


def test_only_what_is_not_finite_is_skipped_without_a_factor() -> None:
    assert skipped(SkipStep(), [1.0, 1e9, math.nan, math.inf, 0.0]) == [False, False, True, True, False]


def test_after_the_most_in_a_row_the_next_step_is_taken_and_counting_begins_anew() -> None:
    broken = [math.nan] * 5

    assert skipped(SkipStep(max_in_row=3), broken) == [True, True, True, False, True]
    assert skipped(SkipStep(max_in_row=3), [math.nan, math.nan, 1.0, *broken[:3]]) == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]


def test_a_norm_above_the_factor_of_the_usual_one_is_skipped() -> None:
    usual = [1.0] * 4

    assert skipped(SkipStep(3.0, warmup=4), [*usual, 2.99]) == [False] * 5
    assert skipped(SkipStep(3.0, warmup=4), [*usual, 3.01]) == [False] * 4 + [True]


def test_nothing_is_skipped_for_its_size_before_enough_steps_were_accepted() -> None:
    assert skipped(SkipStep(3.0, warmup=4), [1.0, 1.0, 1.0, 50.0]) == [False] * 4
    assert skipped(SkipStep(3.0, warmup=4), [1.0, math.nan, 1.0, 1.0, 50.0]) == [False, True, False, False, False]


def test_what_is_skipped_does_not_count_as_usual() -> None:
    assert skipped(SkipStep(3.0, warmup=2), [1.0, 1.0, 100.0, math.nan, 3.01, 2.99]) == [
        *(False, False, True, True),
        *(True, False),
    ]


@pytest.mark.parametrize("window", [2, 10])
def test_the_usual_norm_is_the_exponential_mean_over_the_window(window: int) -> None:
    norms = [1.0, 2.0, 4.0]
    weights = [(1 - 1 / window) ** k for k in (2, 1, 0)]
    usual = np.average(norms, weights=weights)

    assert skipped(SkipStep(2.0, window=window, warmup=3), [*norms, 2 * usual * 0.999])[-1] is False
    assert skipped(SkipStep(2.0, window=window, warmup=3), [*norms, 2 * usual * 1.001])[-1] is True
