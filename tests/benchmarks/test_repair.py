"""What counts as repaired, and what as left alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.casework.recording import CACHE_VARIABLE, RECORDER_VARIABLE
from benchmarks.casework.suites import case_by_id
from benchmarks.casework.treated import Run, beyond, final_loss, trained, twin_loss, verdict
from benchmarks.casework.undisturbed import is_left_alone
from benchmarks.repair import summary
from gradwatch.actions import Clip, SkipStep

pytestmark = pytest.mark.framework("torch")


def test_a_run_that_ends_early_or_with_the_fault_is_not_repaired() -> None:
    case, well = case_by_id("rate-high-sgd"), np.linspace(2.3, 0.1, 500)

    assert verdict(case, 0, well, 500) == (True, "")
    assert verdict(case, 0, well[:400], 500) == (False, "")
    assert verdict(case, 0, np.full(500, 2.3), 500) == (False, "")


def test_steps_that_were_skipped_now_and_then_are_no_part_of_the_training() -> None:
    case, losses = case_by_id("bad-batch-nan"), np.linspace(2.3, 0.1, 300)
    losses[290] = np.nan

    assert verdict(case, 0, losses, 300)[0] is False
    assert verdict(case, 0, losses, 300, skipped=np.isnan(losses))[0] is True


def test_a_training_that_is_too_short_even_without_its_fault_is_held_against_its_twin() -> None:
    case = case_by_id("recurrence-tanh-chaotic")
    twin = case.twin
    assert twin is not None
    case = dataclasses.replace(case, twin=lambda seed: dataclasses.replace(twin(seed), steps=20))
    losses = np.full(200, twin_loss(case, 0))

    assert verdict(case, 0, losses, 200) == (True, "twin")
    assert verdict(case, 0, 1.2 * losses, 200) == (False, "")


def test_what_only_another_architecture_repairs_is_beyond_those_that_may_not_change_it() -> None:
    case = case_by_id("softmax-over-one-unit")

    assert beyond(case, "repair").startswith("architecture: ")
    assert beyond(case, "rebuild") == ""


def test_the_summary_tells_all_runs_from_those_that_could_be_repaired() -> None:
    runs = [
        Run("a", 0, "repair", repaired=True),
        Run(
            "b", 0, "repair", repaired=False, findings=[("stall", "half_underflow", 0, None)], beyond="precision: half"
        ),
        Run("c", 0, "repair", repaired=False, actions=[(9, "GiveUp", "dead", "")]),
    ]

    assert summary(runs, "faulty") == [
        "repair: 1 of 3 runs repaired",
        "repair: 1 of 2 runs that some action could repair repaired",
        "  b: precision: half (stall: half_underflow; to its end)",
        "  c: open (no finding; gave up)",
    ]


def test_a_run_that_is_left_alone_ends_as_if_nobody_had_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv(RECORDER_VARIABLE, "watch")
    case = case_by_id("quad-edge-0.95")
    short = dataclasses.replace(case, build=lambda seed: dataclasses.replace(case.build(seed), steps=120))

    assert is_left_alone(short, 0, "repair")
    assert trained(short, 0, "repair").final == trained(short, 0, "untouched").final
    assert not is_left_alone(short, 0, [SkipStep(), Clip(max_norm=1e-3)])


def test_a_loss_that_is_not_finite_at_the_end_is_infinite() -> None:
    assert final_loss(np.array([1.0] * 50 + [np.nan])) == np.inf
