"""Feeds recorded runs to the detectors, one step at a time as live, and notes when they speak."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.casework.case import Case, Outcome
from benchmarks.casework.recording import framework_name, load, record
from gradwatch.detectors.base import RunContext
from gradwatch.detectors.engine import Engine
from gradwatch.records import Finding, StepBatch

ALARMING = ("warning", "critical")


@dataclass(frozen=True)
class Alarm:
    """A finding of severity warning or critical, from when it was reported until it resolved.

    Args:
        finding: Its last state.
        raised: The step after which it was reported as warning or critical; not the step at which its condition began.
        ended: The last step at which it stood.
    """

    finding: Finding
    raised: int
    ended: int


@dataclass(frozen=True)
class Result:
    """What the detectors said of a run whose end is known."""

    case: str
    suite: str
    seed: int
    outcome: Outcome
    alarms: tuple[Alarm, ...]
    findings: tuple[Finding, ...]
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> Alarm | None:
        """The alarm that came first."""
        return min(self.alarms, key=lambda alarm: alarm.raised, default=None)


def listen(batch: StepBatch, detectors: Any = "default") -> tuple[tuple[Alarm, ...], tuple[Finding, ...]]:
    """Alarms, and all findings in their last state, of the steps of `batch`."""
    engine = Engine(detectors, RunContext(batch.parameters, framework=framework_name()))
    latest: dict[str, Finding] = {}
    raised: dict[str, int] = {}
    for row in batch.split(1):
        for finding in engine.update(row):
            latest[finding.id] = finding
            if finding.severity in ALARMING:
                raised.setdefault(finding.id, int(row.step[0]))
    latest.update((finding.id, finding) for finding in engine.open_findings)
    end = int(batch.step[-1])
    alarms = [_alarm(latest[key], step, end) for key, step in raised.items()]
    return tuple(alarms), tuple(latest.values())


def _alarm(finding: Finding, raised: int, end: int) -> Alarm:
    ended = end if finding.resolved_step is None else max(raised, finding.resolved_step - 1)
    return Alarm(finding, raised, ended)


def replay(case: Case, seed: int, detectors: Any = "default") -> Result:
    """Record the run if need be, and listen to it."""
    found = load(record(case, seed))
    started = time.process_time()
    alarms, findings = listen(found.batch, detectors)
    seconds = time.process_time() - started
    return Result(case.id, case.suite, seed, case.judge(found.losses, seed), alarms, findings, seconds, found.facts)


def replay_all(cases: Sequence[Case], seeds: Iterable[int], *, jobs: int = 1) -> list[Result]:
    """All runs, in `jobs` processes."""
    runs = [(case.id, seed) for case in cases for seed in seeds]
    if jobs == 1:
        known = {case.id: case for case in cases}
        return [replay(known[name], seed) for name, seed in runs]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_replay_by_name, *zip(*runs, strict=True), chunksize=4))


def _replay_by_name(name: str, seed: int) -> Result:
    from benchmarks.casework.suites import case_by_id

    return replay(case_by_id(name), seed)
