import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import detection
from benchmarks.casework import recording, report
from benchmarks.casework.case import Outcome
from benchmarks.casework.labels import classes_of, names_cause
from benchmarks.casework.published import published_cases
from benchmarks.casework.replaying import Alarm, Result
from benchmarks.casework.scoring import MEASURES, Scored, episodes, measure, score_runs
from gradwatch.records import Finding, Parameter, Samples, StepBatch

FAULTY = next(case for case in published_cases() if case.id == "quad-edge-1.05")
HEALTHY = next(case for case in published_cases() if case.id == "quad-edge-0.95")


def alarm(raised: int, ended: int, rule: str = "exploding") -> Alarm:
    finding = Finding(f"{rule}:{raised}", rule, "critical", raised, ended, resolved_step=ended + 1)
    return Alarm(finding, raised, ended)


def failed_run(*alarms: Alarm, at: int | None = 100) -> Scored:
    result = Result(FAULTY.id, "cases", 0, Outcome(True, at, 200, 1.0, 50.0), alarms, ())
    return Scored(FAULTY, result, "failed")


def healthy_run(*alarms: Alarm, steps: int = 1000) -> Scored:
    result = Result(HEALTHY.id, "cases", 0, Outcome(False, None, steps, 1.0, 0.1), alarms, ())
    return Scored(HEALTHY, result, "healthy")


def test_alarms_less_than_fifty_steps_apart_are_one_episode() -> None:
    assert episodes([alarm(0, 10), alarm(59, 60), alarm(110, 110)]) == 2


def test_an_alarm_inside_another_adds_no_episode() -> None:
    assert episodes([alarm(0, 500), alarm(100, 110), alarm(540, 541)]) == 1


@pytest.mark.parametrize(
    ("raised", "ended", "lead"),
    [(70, 75, 30), (20, 200, 50), (20, 40, None), (100, 120, None), (99, 99, 1)],
)
def test_lead_counts_from_the_first_alarm_that_stands_in_the_fifty_steps_before(
    raised: int, ended: int, lead: int | None
) -> None:
    assert failed_run(alarm(raised, ended)).lead() == lead


def test_an_alarm_from_long_before_is_not_raised_in_the_window() -> None:
    assert failed_run(alarm(20, 200)).lead(raised=True) is None


def test_episodes_are_counted_per_ten_thousand_healthy_steps() -> None:
    runs = [healthy_run(alarm(5, 6)), healthy_run(steps=4000), failed_run(alarm(5, 6))]
    assert MEASURES["episodes per 10,000 healthy steps"](runs) == 2.0


def test_a_stuck_run_counts_for_the_step_of_the_first_alarm_only() -> None:
    runs = [failed_run(alarm(12, 80), alarm(30, 80), at=None), failed_run(alarm(90, 95))]
    assert MEASURES["median step of the first alarm, stuck runs"](runs) == 12.0
    assert MEASURES["median lead"](runs) == 10.0


def test_the_verdict_is_right_when_its_class_is_the_label_or_accepted() -> None:
    assert failed_run(alarm(90, 199, "oscillation")).class_right
    assert not failed_run(alarm(90, 199, "vanishing")).class_right


def test_a_run_whose_label_and_outcome_disagree_is_not_scored() -> None:
    result = Result(FAULTY.id, "cases", 0, Outcome(False, None, 200, 1.0, 0.1), (), ())
    assert score_runs([FAULTY], [result])[0].kind == "unclear"


def test_intervals_hold_the_value_and_follow_from_the_cases_alone() -> None:
    runs = [failed_run(alarm(90, 95)), healthy_run(), healthy_run()]
    first, second = measure(runs, resamples=50), measure(runs, resamples=50)
    assert first["recall"] == second["recall"] == (1.0, 1.0, 1.0)


def test_an_imbalance_names_its_class_by_its_direction() -> None:
    growing = Finding("a", "imbalance", "warning", 0, 1, evidence={"direction": "grow"})
    shrinking = Finding("b", "imbalance", "warning", 0, 1, evidence={"direction": "shrink"})
    assert (classes_of(growing), classes_of(shrinking)) == (("exploding",), ("vanishing",))


def test_a_cause_is_right_by_its_id_or_by_one_that_says_the_same() -> None:
    finding = Finding("a", "dead", "critical", 0, 1, evidence={"cause_id": "killed_units"})
    assert names_cause(finding, ("learning_rate",))
    assert not names_cause(finding, ("bad_batch", "init_small"))


def test_a_saved_record_comes_back_as_it_was(tmp_path: Path) -> None:
    batch = StepBatch(
        parameters=(Parameter("fc.weight", (2, 3), depth=1, aliases=("tied",)),),
        step=np.arange(3),
        grad_norm=np.array([[1.0], [-np.inf], [np.nan]], np.float32),
        metrics={"loss": np.array([1.0, 0.5, np.nan])},
        statistics={"weight_norm": Samples(np.array([0, 2]), np.array([[1.0], [2.0]], np.float32))},
    )
    recording.save(tmp_path / "run.npz", batch, np.array([1.0, 0.5, np.nan]), {"id": "x", "seed": 1})
    found = recording.load(tmp_path / "run.npz")
    again = found.batch
    assert (again.parameters, found.facts) == (batch.parameters, {"id": "x", "seed": 1})
    np.testing.assert_array_equal(found.losses, [1.0, 0.5, np.nan])
    np.testing.assert_array_equal(again.grad_norm, batch.grad_norm)
    np.testing.assert_array_equal(again.statistics["weight_norm"].rows, [0, 2])
    np.testing.assert_array_equal(again.metrics["loss"], batch.metrics["loss"])


def test_a_run_is_trained_once_and_a_changed_case_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_BENCHMARK_CACHE", str(tmp_path))
    assert recording.path_of(FAULTY, 0) == recording.path_of(FAULTY, 0)
    assert len({recording.path_of(case, seed) for case in (FAULTY, HEALTHY) for seed in (0, 1)}) == 4


def test_the_program_scores_a_case_and_writes_nothing_for_a_choice_of_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADWATCH_BENCHMARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    detection.main(["--suite", "cases", "--only", "quad-edge-1.05", "--seeds", "1", "--list-misses"])
    printed = capsys.readouterr().out
    assert "1 cases, 1 failed runs (1 delayed blow-ups" in printed
    assert "AUTOTRAINER, with accuracy gate" in printed
    assert not (tmp_path / "results").exists()


def test_a_saved_result_says_when_where_and_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    content = json.loads(report.save("x", {"recall": (1.0, 1.0, float("nan"))}, {}, [failed_run()]).read_text())
    assert content["versions"]["torch"] == torch.__version__
    assert content["measures"]["recall"] == {"value": 1.0, "low": 1.0, "high": None}
    assert content["runs"][0]["case"] == FAULTY.id


def test_a_choice_without_a_case_is_an_error() -> None:
    with pytest.raises(SystemExit, match="No case of suite 'cases' fits"):
        detection.main(["--suite", "cases", "--only", "no-such-case"])
