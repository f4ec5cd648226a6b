"""Do the remedies bring sick trainings back, and do healthy ones feel them?

    python -m benchmarks.repair --part faulty --policies repair,rebuild
    python -m benchmarks.repair --part faulty --policies heal
    python -m benchmarks.repair --part healthy --policies protect,repair --seeds 0,1,2

A faulty run is repaired when it goes to its end in the same process, without restart, and its last quarter is free of
the fault by the case's own criterion: finite, no blow-up against the first loss, better than the best constant, and
below 0.9 times the first loss. Two more count: where the study tells the loss after its own repair, finite and at most
that / 0.95 (one study's targets are random numbers, which nothing predicts better than a constant does); where the same
training without its fault (its twin) is known, finite and at most the twin's loss / 0.95. Steps that were skipped are
no part of the training, if they are at most a tenth of that quarter. `heal` forks the training instead: it may take
half as many steps for the search, and goes on from the best under `repair`. Runs that no change of rates, weights or
steps can repair (each with its reason) count among all runs, and not among the repairable ones.

A healthy run is harmed when its final loss is more than 5 % worse than without gradwatch. Where the recorded run holds
nothing that the policy would clip, skip or act on, the watched run is the same bit for bit: only one in twenty of those
is trained, to hold that against the truth.

`--resume` goes on with what the file of results holds already.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from benchmarks.casework.case import Case
from benchmarks.casework.recording import outcome_of, record
from benchmarks.casework.suites import all_cases
from benchmarks.casework.treated import HEAL, Run, healed, left_alone, trained
from benchmarks.casework.undisturbed import is_left_alone
from benchmarks.machine import machine

#: Ids of published cases that are learning-rate range tests: made to break, nothing to repair.
RANGE_TESTS = "lrfind-"
#: Ids of networks from mean-field theory: not among the failed runs whose remedies were published.
THEORY = "mf-"
#: A healthy run is harmed when it ends this much worse.
HARM = 0.05
#: Of the runs that a policy leaves alone, one in so many is trained all the same.
CHECKED = 20
RESULTS = Path(__file__).parent / "results" / "repair.json"


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


def table_of(runs: Sequence[Run]) -> Table:
    """One row for each run."""
    table = Table("case", "seed", "policy", "steps", "final", "result", "ended", "actions (outcome)", "s")
    for run in runs:
        result = {True: "repaired", False: "sick", None: ""}[run.repaired] + (f" (by its {run.by})" if run.by else "")
        if run.worse is not None:
            result = "left alone" if run.replayed else f"{run.worse:+.1%}"
        did = "; ".join(f"{step} {name} {rule} ({outcome or '-'})" for step, name, rule, outcome in run.actions)
        final, seconds = f"{run.final:.4g}", f"{run.seconds:.1f}"
        table.add_row(run.case, str(run.seed), run.policy, str(run.steps), final, result, run.handed_back, did, seconds)
    return table


def summary(runs: Sequence[Run], part: str) -> list[str]:
    """The numbers that count, by policy."""
    lines: list[str] = []
    for policy in dict.fromkeys(run.policy for run in runs):
        mine = [run for run in runs if run.policy == policy]
        if part == "faulty":
            lines += _repaired(policy, mine)
        elif policy != "untouched":
            harmed = [run for run in mine if run.worse is not None and run.worse > HARM]
            acted, left = sum(len(run.between) for run in mine), sum(run.replayed for run in mine)
            lines.append(
                f"{policy}: {len(harmed)} of {len(mine)} healthy runs more than {HARM:.0%} worse "
                f"({', '.join(run.case for run in harmed) or 'none'}); {acted} between-step actions; "
                f"{left} had nothing to clip, skip or act on"
            )
    return lines


def _repaired(policy: str, runs: Sequence[Run]) -> list[str]:
    """How many of all, of those that some action could repair, and of those whose remedies were published."""
    possible = [run for run in runs if not run.beyond]
    known = [run for run in runs if not run.case.startswith(THEORY)]
    counts = {"": runs, " that some action could repair": possible, f" without {THEORY}*": known}
    lines = [
        f"{policy}: {sum(bool(run.repaired) for run in some)} of {len(some)} runs{which} repaired"
        for which, some in counts.items()
        if which == "" or len(some) < len(runs)
    ]
    for run in runs:
        if not run.repaired:
            causes = ", ".join(dict.fromkeys(f"{rule}: {cause}" for rule, cause, *_ in run.findings)) or "no finding"
            ended = run.handed_back or "to its end"
            lines.append(f"  {run.case}: {run.beyond or 'open'} ({causes}; {ended})")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("faulty", "healthy"), default="faulty")
    parser.add_argument("--suite", choices=("cases", "scenarios", "all"), default="all")
    parser.add_argument("--policies", default="protect,repair,rebuild")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="ids that start with one of these, comma-separated")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the file holds, and add to them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 200)
    runs = saved(options.out) if options.resume and options.out.exists() else []
    done = {(run.case, run.seed, run.policy) for run in runs}
    for case in sorted(all_cases(), key=lambda case: case.cost):
        if options.suite not in ("all", case.suite) or not case.id.startswith(tuple(options.only.split(","))):
            continue
        for seed in map(int, options.seeds.split(",")):
            policies = [name for name in options.policies.split(",") if (case.id, seed, name) not in done]
            if policies and is_subject(case, seed, options.part):
                runs += compared(case, seed, policies, options.part, console)
                save(runs, options.part, options.out)
    console.print(table_of(runs))
    for line in summary(runs, options.part):
        console.print(line)


def save(runs: Sequence[Run], part: str, path: Path) -> None:
    """Write what there is, so that a long benchmark can be cut short."""
    path.parent.mkdir(exist_ok=True)
    known = {**machine("torch"), "part": part, "summary": summary(runs, part), "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def saved(path: Path) -> list[Run]:
    """The runs in a file of results."""
    return [Run(**run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]


def compared(case: Case, seed: int, policies: Sequence[str], part: str, console: Console) -> list[Run]:
    """The runs of one case under each policy; healthy ones against the untouched run."""
    runs = []
    for name in policies:
        if part == "healthy":
            run = _held_against_untouched(case, seed, name)
        else:
            run = healed(case, seed) if name == HEAL else trained(case, seed, name)
        runs.append(run)
        acts = [f"{step}:{act}({outcome})" for step, act, _, outcome in run.actions]
        result: Any = run.repaired if part == "faulty" else "left alone" if run.replayed else f"{run.worse:+.2%}"
        console.print(f"{case.id} s{seed} {name}: {result} {run.final:.4g} {acts} {run.stopped[:60]}", style="dim")
    return runs


def _held_against_untouched(case: Case, seed: int, policy: str) -> Run:
    reference = left_alone(case, seed, policy)
    if reference.steps < case.build(seed).steps:  # recordings end after a minute
        reference = trained(case, seed, "untouched")
    is_alone = is_left_alone(case, seed, policy)
    if is_alone and hash_of(case.id, seed) % CHECKED:
        reference.worse = 0.0
        return reference
    run = trained(case, seed, policy)
    run.worse = (run.final - reference.final) / max(abs(reference.final), 1e-12)
    if is_alone and (run.final != reference.final or run.between):
        raise RuntimeError(f"{case.id} s{seed}: {policy} was to leave it alone: {reference.final!r}, {run.final!r}")
    return run


def hash_of(name: str, seed: int) -> int:
    """The same number in every process."""
    return sum(name.encode()) + seed


if __name__ == "__main__":
    main()
