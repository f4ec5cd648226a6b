"""Do the remedies bring sick trainings back, and do healthy ones feel them?

    python -m benchmarks.repair --part faulty --policies repair,rebuild
    python -m benchmarks.repair --part faulty --policies heal
    python -m benchmarks.repair --part healthy --policies protect,repair --seeds 0,1,2

A faulty run is repaired when it goes to its end in the same process, without restart, and its last quarter is free of
the fault by the case's own criterion: finite, no blow-up against the first loss, better than the best constant, and
below 0.9 times the first loss; or, where the study tells the loss after its own repair, finite and at most that / 0.95
(one study's targets are random numbers, which nothing predicts better than a constant does). Steps that were skipped
are no part of the training, if they are at most a tenth of that quarter. `heal` forks the training instead: it may take
half as many steps for the search, and goes on from the best under `repair`. A healthy run is harmed when its final loss
is more than 5 % worse than without gradwatch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import gradwatch as gw
from benchmarks.casework.case import Case, Losses
from benchmarks.casework.outcome import STUCK
from benchmarks.casework.recording import outcome_of, record
from benchmarks.casework.suites import all_cases
from benchmarks.machine import machine

#: Ids of published cases that are learning-rate range tests: made to break, nothing to repair.
RANGE_TESTS = "lrfind-"
#: Ids of networks from mean-field theory: not among the failed runs whose remedies were published.
THEORY = "mf-"
#: A healthy run is harmed when it ends this much worse.
HARM = 0.05
#: Share of the last quarter that may have been skipped.
MOST_SKIPPED = 0.1
IN_STEP = ("SkipStep", "Clip", "ZClip", "AutoClip", "AGC", "GiveUp")
#: The policy that searches, and the fewest steps that a search makes sense with.
HEAL, LEAST_SEARCH = "heal", 60
RESULTS = Path(__file__).parent / "results" / "repair.json"


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
        by_study: Whether it counts as repaired only because it ends where the study's own repair does.
        seconds: Processor time.
        actions: Between-step actions: step, name, rule, outcome.
        stopped: Why a `Stop` ended it.
        worse: Final loss relative to the untouched run's, minus 1; None for faulty cases.
    """

    case: str
    seed: int
    policy: str
    steps: int = 0
    first: float = math.nan
    final: float = math.nan
    repaired: bool | None = None
    by_study: bool = False
    seconds: float = 0.0
    actions: list[tuple[int, str, str, str]] = field(default_factory=list)
    stopped: str = ""
    worse: float | None = None
    findings: list[str] = field(default_factory=list)

    @property
    def between(self) -> list[tuple[int, str, str, str]]:
        """Its between-step actions."""
        return [action for action in self.actions if action[1] not in IN_STEP]


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
    run.repaired, run.by_study = verdict(case, seed, losses, steps)
    return run


def trained(case: Case, seed: int, policy: str) -> tuple[Run, Losses]:
    """Train a case under a policy; returns what happened and the losses."""
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
        run.findings = [finding.id for finding in watcher.findings]
        recorded = gw.load(Path(folder) / "run").actions()
        skipped = gw.load(Path(folder) / "run").metrics()["skipped"].to_numpy() > 0
        run.actions = [(int(a.step), a.action, a.reason, a.outcome) for a in recorded.itertuples()]
        if watcher.faults.messages:
            raise RuntimeError(f"{case.id}: {watcher.faults.messages}")
    run.seconds, run.steps = time.process_time() - started, len(losses)
    found = np.array(losses)
    finite = found[np.isfinite(found)]
    run.first = float(finite[0]) if len(finite) else math.nan
    run.final = final_loss(found)
    if case.faulty:
        run.repaired, run.by_study = verdict(case, seed, found, training.steps, skipped=skipped)
    return run, found


def final_loss(losses: Losses) -> float:
    """Median of the last twentieth; infinite when one of them is not finite."""
    last = losses[-max(5, len(losses) // 20) :]
    return float(np.median(last)) if np.isfinite(last).all() else math.inf


def verdict(
    case: Case, seed: int, losses: Losses, steps: int, *, skipped: NDArray[np.bool_] | None = None
) -> tuple[bool, bool]:
    """Whether the run came to its end and the fault is not in its last quarter; and whether only the study says so."""
    if len(losses) < steps:
        return False, False
    first = losses[np.isfinite(losses)][:1]
    last_quarter = losses[-max(20, steps // 4) :]
    if skipped is not None and skipped[-len(last_quarter) :].mean() <= MOST_SKIPPED:
        last_quarter = last_quarter[~skipped[-len(last_quarter) :]]
    outcome = case.judge(np.concatenate([first, last_quarter]), seed)
    by_study = bool(np.isfinite(last_quarter).all()) and outcome.final_loss <= study_loss(case) / 0.95
    is_well = not outcome.failed and outcome.final_loss < STUCK * outcome.first_loss
    return is_well or by_study, not is_well and by_study


def study_loss(case: Case) -> float:
    """The loss after the study's own repair, told as "loss 7.85 -> .693"; minus infinity where none is told."""
    told = ((case.spec or {}).get("source") or {}).get("before_after") or ""
    found = re.fullmatch(r"loss \S+ -> ([\d.]+)(/\S+)?", told)
    return float(found[1]) if found else -math.inf


def is_subject(case: Case, seed: int, part: str) -> bool:
    """Whether a case belongs to the part, and for faulty ones whether the fault comes true with this seed."""
    if part == "healthy":
        return not case.faulty and case.tier == "core"
    if not case.faulty or case.tier != "core" or case.id.startswith(RANGE_TESTS):
        return False
    outcome = outcome_of(case, seed, record(case, seed))
    return outcome.failed and not is_silent(case)


def is_silent(case: Case) -> bool:
    """Whether the loss looks well although a part of the network is sick: then no loss can show a repair."""
    keywords = getattr(case.judge, "keywords", {})
    return bool(keywords.get("ends") == "silent")


def table_of(runs: Sequence[Run], part: str) -> Table:
    """One row for each run."""
    table = Table("case", "seed", "policy", "steps", "final", "result", "actions (outcome)", "s")
    for run in runs:
        result = {True: "repaired", False: "sick", None: ""}[run.repaired] + (" (study's own)" if run.by_study else "")
        if run.worse is not None:
            result = f"{run.worse:+.1%}"
        did = "; ".join(f"{step} {name} {rule} ({outcome or '-'})" for step, name, rule, outcome in run.actions)
        table.add_row(
            run.case, str(run.seed), run.policy, str(run.steps), f"{run.final:.4g}", result, did, f"{run.seconds:.1f}"
        )
    return table


def summary(runs: Sequence[Run], part: str) -> list[str]:
    """The numbers that count, by policy."""
    lines = []
    for policy in dict.fromkeys(run.policy for run in runs):
        mine = [run for run in runs if run.policy == policy]
        if part == "faulty":
            good = sum(bool(run.repaired) for run in mine)
            ended = Counter("gave up" if run.stopped else "" for run in mine if not run.repaired)
            lines.append(f"{policy}: {good} of {len(mine)} repaired; of the others {ended['gave up']} were stopped")
            known = [run for run in mine if not run.case.startswith(THEORY)]
            good = sum(bool(run.repaired) for run in known)
            lines.append(f"{policy}, without {THEORY}*: {good} of {len(known)} repaired")
        elif policy != "untouched":
            harmed = [run for run in mine if run.worse is not None and run.worse > HARM]
            acted = sum(len(run.between) for run in mine)
            lines.append(
                f"{policy}: {len(harmed)} of {len(mine)} healthy runs more than {HARM:.0%} worse "
                f"({', '.join(run.case for run in harmed) or 'none'}); {acted} between-step actions"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("faulty", "healthy"), default="faulty")
    parser.add_argument("--suite", choices=("cases", "scenarios", "all"), default="all")
    parser.add_argument("--policies", default="protect,repair,rebuild")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="ids that start with one of these, comma-separated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 200)
    runs: list[Run] = []
    for case in sorted(all_cases(), key=lambda case: case.cost):
        if options.suite not in ("all", case.suite) or not case.id.startswith(tuple(options.only.split(","))):
            continue
        for seed in map(int, options.seeds.split(",")):
            if is_subject(case, seed, options.part):
                runs += compared(case, seed, options.policies.split(","), options.part, console)
                save(runs, options.part, options.out)
    console.print(table_of(runs, options.part))
    for line in summary(runs, options.part):
        console.print(line)


def save(runs: Sequence[Run], part: str, path: Path) -> None:
    """Write what there is, so that a long benchmark can be cut short."""
    path.parent.mkdir(exist_ok=True)
    saved = {**machine("torch"), "part": part, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


def compared(case: Case, seed: int, policies: Sequence[str], part: str, console: Console) -> list[Run]:
    """The runs of one case under each policy; healthy ones against the untouched run."""
    names = ["untouched", *policies] if part == "healthy" else list(policies)
    runs = []
    for name in names:
        run = healed(case, seed) if name == HEAL else trained(case, seed, name)[0]
        if part == "healthy":
            reference = runs[0].final if runs else run.final
            run.worse = (run.final - reference) / max(abs(reference), 1e-12)
        runs.append(run)
        acts = [f"{step}:{act}({outcome})" for step, act, _, outcome in run.actions]
        result = run.repaired if part == "faulty" else f"{run.worse:+.2%}"
        console.print(f"{case.id} s{seed} {name}: {result} {run.final:.4g} {acts} {run.stopped[:60]}", style="dim")
    return runs


if __name__ == "__main__":
    main()
