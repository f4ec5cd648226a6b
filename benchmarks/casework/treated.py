"""A training under a policy: what was done to it, and whether it was repaired."""

from __future__ import annotations

import math
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import gradwatch as gw
from benchmarks.casework.case import Case, Losses
from benchmarks.casework.outcome import STUCK
from benchmarks.casework.recording import load, record
from benchmarks.casework.training import run as train

#: Share of the last quarter that may have been skipped.
MOST_SKIPPED = 0.1
#: Share of the reference's quality that a repaired run must reach.
GOOD = 0.95
IN_STEP = ("SkipStep", "Clip", "ZClip", "AutoClip", "AGC", "GiveUp")
#: The policy that searches, and the fewest steps that a search makes sense with.
HEAL, LEAST_SEARCH = "heal", 60


@dataclass
class Run:
    """One training under one policy.

    Args:
        case: Id.
        seed: Its seed.
        policy: Name of a preset, or `untouched`.
        steps: Steps taken.
        first: Its first finite loss.
        final: Median of the last twentieth of the losses.
        repaired: Whether it ended without the fault; None for healthy cases.
        by: Whose criterion alone says so: the `study`'s own repair, or the healthy `twin`; empty for the case's own.
        seconds: Processor time.
        actions: Actions: step, name, rule, outcome.
        stopped: Why a `Stop` ended it.
        worse: Final loss relative to the untouched run's, minus 1; None for faulty cases.
        replayed: Whether it was not trained, because the record shows that the policy has nothing to do in it.
        findings: Warnings and critical findings: rule, cause, first step, step of the resolution.
        beyond: Why no action of the policy can repair it.
    """

    case: str
    seed: int
    policy: str
    steps: int = 0
    first: float = math.nan
    final: float = math.nan
    repaired: bool | None = None
    by: str = ""
    seconds: float = 0.0
    actions: list[tuple[int, str, str, str]] = field(default_factory=list)
    stopped: str = ""
    worse: float | None = None
    replayed: bool = False
    findings: list[tuple[str, str, int, int | None]] = field(default_factory=list)
    beyond: str = ""

    @property
    def between(self) -> list[tuple[int, str, str, str]]:
        """Its between-step actions."""
        return [action for action in self.actions if action[1] not in IN_STEP]

    @property
    def handed_back(self) -> str:
        """How the policy said that it can do no more: `stopped`, `gave up`, or empty."""
        return "stopped" if self.stopped else "gave up" if any(a[1] == "GiveUp" for a in self.actions) else ""


def healed(case: Case, seed: int) -> Run:
    """Search with half of the case's steps, then go on from the best fork to the end."""
    torch.set_num_threads(1)
    run, started = Run(case.id, seed, HEAL), time.process_time()
    steps = case.build(seed).steps
    found = gw.heal(lambda: case.build(seed), budget_steps=max(steps // 2, LEAST_SEARCH), progress=False)
    best = found.best
    try:
        best.run(max(0, steps - best.steps), preset="repair")
    except gw.StopTraining as reason:
        run.stopped = str(reason)
    losses = np.array(best.losses)
    run.seconds, run.steps = time.process_time() - started, found.steps
    run.actions = [(0, best.candidate.name, "", "")]
    run.first, run.final = float(losses[0]), final_loss(losses)
    run.repaired, run.by = verdict(case, seed, losses, steps)
    return run


def trained(case: Case, seed: int, policy: str) -> Run:
    """Train a case under a policy."""
    torch.set_num_threads(1)
    training = case.build(seed)
    run, losses, started = Run(case.id, seed, policy), [], time.process_time()
    actions: Any = () if policy == "untouched" else policy
    with tempfile.TemporaryDirectory() as folder:
        watcher = gw.watch(training.model, training.optimizer, run_dir=Path(folder) / "run", actions=actions)
        try:
            for k in range(training.steps):
                losses.append(float(training.step(k)))
                watcher.log(loss=losses[-1])
        except gw.StopTraining as reason:
            run.stopped = str(reason)
        watcher.close()
        alarms = [finding for finding in watcher.findings if finding.severity != "info"]
        run.findings = [(f.rule, f.evidence.get("cause_id", ""), f.first_step, f.resolved_step) for f in alarms]
        recorded: Any = gw.load(Path(folder) / "run").actions()
        skipped = gw.load(Path(folder) / "run").metrics()["skipped"].to_numpy() > 0
        told = recorded.to_dict("records")
        run.actions = [(int(a["step"]), str(a["action"]), str(a["reason"]), str(a["outcome"])) for a in told]
        if watcher.faults.messages:
            raise RuntimeError(f"{case.id}: {watcher.faults.messages}")
    run.seconds, run.steps = time.process_time() - started, len(losses)
    found = np.array(losses)
    finite = found[np.isfinite(found)]
    run.first = float(finite[0]) if len(finite) else math.nan
    run.final = final_loss(found)
    if case.faulty:
        run.repaired, run.by = verdict(case, seed, found, training.steps, skipped=skipped)
        run.beyond = beyond(case, policy)
    return run


def beyond(case: Case, policy: str) -> str:
    """Why no action of the policy can repair the case; empty where one might."""
    return "" if policy == "rebuild" and case.beyond.startswith("architecture") else case.beyond


def left_alone(case: Case, seed: int, policy: str) -> Run:
    """A healthy run that a policy has nothing to do in: the recorded one."""
    losses = load(record(case, seed)).losses
    return Run(case.id, seed, policy, len(losses), float(losses[0]), final_loss(losses), replayed=True)


def final_loss(losses: Losses) -> float:
    """Median of the last twentieth; infinite when one of them is not finite."""
    last = losses[-max(5, len(losses) // 20) :]
    return float(np.median(last)) if np.isfinite(last).all() else math.inf


def verdict(
    case: Case, seed: int, losses: Losses, steps: int, *, skipped: NDArray[np.bool_] | None = None
) -> tuple[bool, str]:
    """Whether the run came to its end and the fault is not in its last quarter; and by whose criterion alone."""
    if len(losses) < steps:
        return False, ""
    first = losses[np.isfinite(losses)][:1]
    last_quarter = losses[-max(20, steps // 4) :]
    if skipped is not None and skipped[-len(last_quarter) :].mean() <= MOST_SKIPPED:
        last_quarter = last_quarter[~skipped[-len(last_quarter) :]]
    outcome = case.judge(np.concatenate([first, last_quarter]), seed)
    if not outcome.failed and outcome.final_loss < STUCK * outcome.first_loss:
        return True, ""
    for name, loss in (("study", study_loss(case)), ("twin", twin_loss(case, seed))):
        if np.isfinite(last_quarter).all() and outcome.final_loss <= loss / GOOD:
            return True, name
    return False, ""


def study_loss(case: Case) -> float:
    """The loss after the study's own repair, told as "loss 7.85 -> .693"; minus infinity where none is told."""
    told = ((case.spec or {}).get("source") or {}).get("before_after") or ""
    found = re.fullmatch(r"loss \S+ -> ([\d.]+)(/\S+)?", told)
    return float(found[1]) if found else -math.inf


def twin_loss(case: Case, seed: int) -> float:
    """Where the same training ends without its fault; minus infinity where the case has no twin."""
    return final_loss(train(case.twin(seed), lambda loss: None)) if case.twin is not None else -math.inf
