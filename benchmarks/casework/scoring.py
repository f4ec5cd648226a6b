"""The scores of `benchmarks/README.md` over replayed runs, with intervals from a bootstrap over cases."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.casework.case import Case
from benchmarks.casework.labels import classes_of, names_cause
from benchmarks.casework.replaying import Alarm, Result
from gradwatch.records import Finding
from gradwatch.reporters import story

#: Alarms less than this many steps apart are one episode, and an alarm this far ahead of a failure is in time.
EPISODE = 50
#: Runs that fail before this step fail at once; nobody can be warned.
DELAYED = 10


@dataclass(frozen=True)
class Scored:
    """A run beside its label."""

    case: Case
    result: Result
    kind: str  # failed, healthy, or unclear: label and outcome disagree

    @property
    def detected(self) -> bool:
        """Whether there was any alarm."""
        return bool(self.result.alarms)

    @property
    def delayed(self) -> bool:
        """Whether it failed, but late enough that a warning was possible, and not out of the blue."""
        step = self.result.outcome.failure_step
        return self.kind == "failed" and step is not None and step >= DELAYED and not self.case.sudden

    @functools.cached_property
    def verdict(self) -> Finding | None:
        """The finding that gradwatch's summary is headed by."""
        trouble = story.trouble(story.chapters(alarm.finding for alarm in self.result.alarms))
        return trouble.root.lead if trouble else None

    def lead(self, *, raised: bool = False) -> int | None:
        """Steps from the first alarm in the 50 steps before the failure to the failure; None without one.

        Args:
            raised: Count only alarms that were raised in these steps, not those that still stood from before.
        """
        end = self.result.outcome.failure_step
        if end is None:
            return None
        steps = [_first_in(alarm, end - EPISODE, end - 1, raised) for alarm in self.result.alarms]
        known = [step for step in steps if step is not None]
        return end - min(known) if known else None

    @functools.cached_property
    def class_right(self) -> bool:
        """Whether the verdict names the fault's class."""
        return self.verdict is not None and not {*classes_of(self.verdict)}.isdisjoint(self.case.classes)

    @functools.cached_property
    def any_class_right(self) -> bool:
        """Whether any alarm names the fault's class."""
        return any(not {*classes_of(a.finding)}.isdisjoint(self.case.classes) for a in self.result.alarms)

    @functools.cached_property
    def cause_right(self) -> bool:
        """Whether the verdict names one of the causes."""
        return self.verdict is not None and names_cause(self.verdict, self.case.causes)

    @functools.cached_property
    def rule_right(self) -> bool:
        """Whether one of the expected rules fired."""
        return any(alarm.finding.rule in self.case.rules for alarm in self.result.alarms)


def _first_in(alarm: Alarm, low: int, high: int, raised: bool) -> int | None:
    start = alarm.raised if raised else max(alarm.raised, low)
    return start if low <= start <= min(high, alarm.ended) else None


def episodes(alarms: Sequence[Alarm]) -> int:
    """Number of stretches of alarm, those less than 50 steps apart merged.

    Examples:
        >>> finding = Finding("spike:3", "spike", "warning", 3, 3)
        >>> episodes([Alarm(finding, 3, 5), Alarm(finding, 40, 60), Alarm(finding, 200, 200)])
        2
    """
    count, reach = 0, -np.inf
    for alarm in sorted(alarms, key=lambda alarm: alarm.raised):
        count += alarm.raised - reach >= EPISODE
        reach = max(reach, alarm.ended)
    return count


def score_runs(cases: Sequence[Case], results: Sequence[Result]) -> list[Scored]:
    """Each run beside its label; `stochastic` cases are labelled by their outcome."""
    known = {case.id: case for case in cases}
    return [Scored(known[r.case], r, _kind(known[r.case], r)) for r in results]


def _kind(case: Case, result: Result) -> str:
    if case.tier != "stochastic" and case.faulty != result.outcome.failed:
        return "unclear"
    return "failed" if result.outcome.failed else "healthy"


Measure = Callable[[Sequence[Scored]], float]


def _share(runs: Sequence[Scored], test: Callable[[Scored], bool]) -> float:
    return sum(map(test, runs)) / len(runs) if runs else float("nan")


def _median(values: Sequence[int | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else float("nan")


def _failed(runs: Sequence[Scored]) -> list[Scored]:
    return [run for run in runs if run.kind == "failed"]


def _healthy(runs: Sequence[Scored]) -> list[Scored]:
    return [run for run in runs if run.kind == "healthy"]


def _found(runs: Sequence[Scored]) -> list[Scored]:
    return [run for run in _failed(runs) if run.detected and run.case.faulty]


def _delayed(runs: Sequence[Scored]) -> list[Scored]:
    return [run for run in runs if run.delayed]


def precision(runs: Sequence[Scored]) -> float:
    """Share of alarmed runs that had failed."""
    return _share([run for run in runs if run.detected and run.kind != "unclear"], lambda run: run.kind == "failed")


def episode_rate(runs: Sequence[Scored]) -> float:
    """Episodes of alarm per 10,000 healthy steps."""
    healthy = _healthy(runs)
    steps = sum(run.result.outcome.steps for run in healthy)
    return 1e4 * sum(episodes(run.result.alarms) for run in healthy) / steps if steps else float("nan")


def stuck_step(runs: Sequence[Scored]) -> float:
    """Median step of the first alarm in runs that got stuck."""
    firsts = [run.result.first for run in _failed(runs) if run.result.outcome.stuck]
    return _median([alarm.raised for alarm in firsts if alarm])


MEASURES: dict[str, Measure] = {
    "recall": lambda runs: _share(_failed(runs), lambda run: run.detected),
    "precision": precision,
    "healthy runs alarmed": lambda runs: _share(_healthy(runs), lambda run: run.detected),
    "episodes per 10,000 healthy steps": episode_rate,
    "delayed blow-ups warned": lambda runs: _share(_delayed(runs), lambda run: run.lead() is not None),
    "median lead": lambda runs: _median([run.lead() for run in _delayed(runs)]),
    "delayed blow-ups, raised in the window": lambda runs: _share(
        _delayed(runs), lambda run: run.lead(raised=True) is not None
    ),
    "median lead, raised in the window": lambda runs: _median([run.lead(raised=True) for run in _delayed(runs)]),
    "median step of the first alarm, stuck runs": stuck_step,
    "class right": lambda runs: _share(_found(runs), lambda run: run.class_right),
    "class right in any alarm": lambda runs: _share(_found(runs), lambda run: run.any_class_right),
    "expected rule fired": lambda runs: _share(
        [run for run in _failed(runs) if run.case.rules], lambda run: run.rule_right
    ),
    "cause right": lambda runs: _share([run for run in _found(runs) if run.case.causes], lambda run: run.cause_right),
}


def measure(runs: Sequence[Scored], *, resamples: int = 500) -> dict[str, tuple[float, float, float]]:
    """Every measure with its 95 % interval: cases are drawn with replacement, runs of a case stay together."""
    by_case: dict[str, list[Scored]] = defaultdict(list)
    for run in runs:
        by_case[run.case.id].append(run)
    groups = list(by_case.values())
    random = np.random.default_rng(0)
    draws = [
        [run for i in random.integers(len(groups), size=len(groups)) for run in groups[i]] for _ in range(resamples)
    ]
    found = {}
    for name, formula in MEASURES.items():
        values = np.array([formula(draw) for draw in draws])
        values = values[~np.isnan(values)]
        low, high = np.quantile(values, (0.025, 0.975)) if values.size else (float("nan"), float("nan"))
        found[name] = (formula(runs), float(low), float(high))
    return found


@dataclass(frozen=True)
class RuleScore:
    """One rule over all runs.

    Args:
        failed: Failed runs in which it alarmed.
        healthy: Healthy runs in which it alarmed.
        first: Failed runs in which no rule alarmed before it.
        expected: Failed runs in which it was expected (scenarios name their rules).
        expected_found: Of these, those in which it alarmed.
        lead: Median steps ahead of a delayed blow-up.
    """

    failed: int
    healthy: int
    first: int
    expected: int
    expected_found: int
    lead: float


def score_rules(runs: Sequence[Scored]) -> dict[str, RuleScore]:
    """Every rule that alarmed anywhere."""
    rules = sorted({alarm.finding.rule for run in runs for alarm in run.result.alarms})
    return {rule: _score_rule(rule, runs) for rule in rules}


def _score_rule(rule: str, runs: Sequence[Scored]) -> RuleScore:
    def fired(run: Scored) -> list[Alarm]:
        return [alarm for alarm in run.result.alarms if alarm.finding.rule == rule]

    failed = [run for run in _failed(runs) if fired(run)]
    expected = [run for run in _failed(runs) if rule in run.case.rules]
    leads = [
        min(steps) for run in failed if run.delayed
        if (steps := [run.result.outcome.failure_step - a.raised for a in fired(run)
                      if run.result.outcome.failure_step is not None and a.raised < run.result.outcome.failure_step])
    ]  # fmt: skip
    return RuleScore(
        failed=len(failed),
        healthy=sum(bool(fired(run)) for run in _healthy(runs)),
        first=sum(any(a.raised == min(b.raised for b in run.result.alarms) for a in fired(run)) for run in failed),
        expected=len(expected),
        expected_found=sum(bool(fired(run)) for run in expected),
        lead=_median(leads),
    )
