"""The tables of the detection benchmark, on the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import gradwatch
from benchmarks.casework.peers import PEERS
from benchmarks.casework.scoring import RuleScore, Scored, episodes

RESULTS = Path(__file__).resolve().parent.parent / "results"

Measured = dict[str, tuple[float, float, float]]


def show_measures(console: Console, title: str, measured: Measured, runs: Sequence[Scored]) -> None:
    """All measures with their intervals."""
    kinds = Counter(run.kind for run in runs)
    steps = sum(run.result.outcome.steps for run in runs if run.kind == "healthy")
    delayed = sum(run.delayed for run in runs)
    stuck = sum(run.kind == "failed" and run.result.outcome.stuck for run in runs)
    console.print(
        f"\n[bold]{title}[/bold]: {len({run.case.id for run in runs})} cases, {kinds['failed']} failed runs "
        f"({delayed} delayed blow-ups, {stuck} stuck), {kinds['healthy']} healthy runs of {steps:,} steps, "
        f"{kinds['unclear']} whose label and outcome disagree (not scored)"
    )
    table = Table("measure", "value", "95 % interval over cases")
    for name, (value, low, high) in measured.items():
        table.add_row(name, number(name, value), f"{number(name, low)} to {number(name, high)}")
    console.print(table)


def show_peers(console: Console, measured: Measured) -> None:
    """Ours beside the peers'."""
    table = Table(
        "detector",
        "recall",
        "healthy alarmed",
        "precision",
        "episodes / 10k",
        "delayed warned",
        "lead",
        "stuck found at",
    )
    names = (
        "recall", "healthy runs alarmed", "precision", "episodes per 10,000 healthy steps", "delayed blow-ups warned",
        "median lead", "median step of the first alarm, stuck runs",
    )  # fmt: skip
    table.add_row("[bold]gradwatch, these runs[/bold]", *(number(name, measured[name][0]) for name in names))
    for peer in PEERS:
        values = (
            peer.recall, peer.healthy_alarmed, peer.precision, peer.episodes, peer.warned, peer.lead, peer.stuck_step,
        )  # fmt: skip
        table.add_row(peer.name, *(number(name, value) for name, value in zip(names, values, strict=True)))
    console.print(table)


def show_rules(console: Console, scores: dict[str, RuleScore]) -> None:
    """Rule by rule."""
    table = Table(
        "rule", "failed runs", "healthy runs", "precision", "first to speak", "expected and found", "median lead"
    )
    for rule, score in scores.items():
        total = score.failed + score.healthy
        expected = f"{score.expected_found} of {score.expected}" if score.expected else ""
        table.add_row(
            rule, str(score.failed), str(score.healthy), f"{score.failed / total:.2f}", str(score.first), expected,
            number("lead", score.lead),
        )  # fmt: skip
    console.print(table)


def number(name: str, value: float) -> str:
    """A measure's value as a person reads it."""
    if math.isnan(value):
        return "-"
    counted = any(word in name for word in ("episodes", "lead", "step of"))
    return f"{value:.3g}" if counted else f"{100 * value:.1f} %"


def misses(runs: Sequence[Scored]) -> Iterable[tuple[str, Scored]]:
    """What went wrong, and in which run."""
    for run in runs:
        if run.kind == "unclear":
            yield "label and outcome disagree", run
        elif run.kind == "healthy" and run.detected:
            yield "false alarm", run
        elif run.kind == "failed" and not run.detected:
            yield "missed", run
        elif run.kind == "failed" and run.case.faulty:
            if run.delayed and run.lead() is None:
                yield "not warned in time", run
            if not run.class_right:
                yield "class wrong", run
            if run.case.causes and not run.cause_right:
                yield "cause wrong", run


def show_misses(console: Console, runs: Sequence[Scored]) -> None:
    """Every miss with the record's evidence."""
    for kind, run in misses(runs):
        outcome = run.result.outcome
        end = "stuck" if outcome.stuck else f"fails at {outcome.failure_step}" if outcome.failed else "well"
        console.print(
            f"\n[bold]{kind}[/bold]: {run.case.id} seed {run.result.seed} ({'/'.join(run.case.classes)}"
            f"{'; ' + '/'.join(run.case.causes) if run.case.causes else ''}; {end}; {outcome.steps} steps, "
            f"loss {outcome.first_loss:.3g} to {outcome.final_loss:.3g})"
        )
        for alarm in sorted(run.result.alarms, key=lambda alarm: alarm.raised)[:4]:
            finding = alarm.finding
            console.print(
                f"   step {alarm.raised} to {alarm.ended}: {finding.rule} ({finding.severity}) {finding.message} "
                f"[dim]cause: {finding.cause}; {json.dumps(finding.to_json()['evidence'])[:300]}[/dim]",
                highlight=False,
                markup=True,
            )


def save(name: str, measured: Measured, scores: dict[str, RuleScore], runs: Sequence[Scored], **options: Any) -> Path:
    """Write everything to `benchmarks/results`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    rows = [_row(run) for run in runs]
    content = {
        **provenance(),
        "options": options,
        "measures": {key: {"value": v, "low": low, "high": high} for key, (v, low, high) in measured.items()},
        "rules": {rule: dataclasses.asdict(score) for rule, score in scores.items()},
        "runs": rows,
    }
    path.write_text(json.dumps(_plain(content), indent=1) + "\n")
    return path


def provenance() -> dict[str, Any]:
    """When, where, and with which versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            "gradwatch": gradwatch.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            **{name: sys.modules[name].__version__ for name in ("keras", "tensorflow") if name in sys.modules},
        },
    }


def _row(run: Scored) -> dict[str, Any]:
    first, verdict = run.result.first, run.verdict
    return {
        "case": run.case.id,
        "seed": run.result.seed,
        "kind": run.kind,
        "failure_step": run.result.outcome.failure_step,
        "steps": run.result.outcome.steps,
        "first_alarm": first.raised if first else None,
        "lead": run.lead(),
        "episodes": episodes(run.result.alarms),
        "rules": sorted({alarm.finding.rule for alarm in run.result.alarms}),
        "verdict": verdict.rule if verdict else None,
        "cause": verdict.evidence.get("cause_id") if verdict else None,
        "class_right": run.class_right,
        "cause_right": run.cause_right,
    }


def _plain(value: Any) -> Any:
    """NaN is null in JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
