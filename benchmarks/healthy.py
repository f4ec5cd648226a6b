"""Is gradwatch quiet where all is well? Long healthy trainings of the usual kinds, 50,000 steps in all.

    python -m benchmarks.healthy

Allowed: no critical finding, and at most one warning.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections import Counter
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from benchmarks.casework import report
from benchmarks.casework.case import Case, Training
from benchmarks.casework.recording import record_all
from benchmarks.casework.replaying import replay
from benchmarks.casework.scenarios import SCENARIOS
from benchmarks.casework.scoring import score_runs

TRAININGS = (
    "cnn-adam",
    "lstm-rows",
    "transformer-warmup",
    "finetune-tiny-norms",
    "vae-summed-loss",
    "gan-digits",
    "heavy-tailed-regression",
    "zero-initialised-last-layer",
    "converges-to-zero",
    "memorises-64-samples",
)


def lengthened(case: Case, steps: int) -> Case:
    """The same training with another number of steps."""

    def build(seed: int) -> Training:
        return dataclasses.replace(case.build(seed), steps=steps)

    name, fingerprint = f"{case.id}-for-{steps}-steps", f"{case.fingerprint} for {steps}"
    return dataclasses.replace(case, id=name, build=build, fingerprint=fingerprint)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, replay, count, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    console = Console(width=None if Console().is_terminal else 150)
    cases = [lengthened(SCENARIOS[name], options.steps // len(TRAININGS)) for name in TRAININGS]
    record_all(cases, [options.seed], progress=lambda line: console.print(line, style="dim", highlight=False))
    results = [replay(case, options.seed) for case in cases]
    table = Table("training", "steps", "loss", "critical", "warning", "findings")
    totals: Counter[str] = Counter()
    for case, result in zip(cases, results, strict=True):
        counts = Counter(alarm.finding.severity for alarm in result.alarms)
        totals += counts
        totals["steps"] += result.outcome.steps
        losses = f"{result.outcome.first_loss:.3g} to {result.outcome.final_loss:.3g}"
        said = "; ".join(f"step {alarm.raised}: {alarm.finding.message}" for alarm in result.alarms)
        row = (case.id, f"{result.outcome.steps:,}", losses, str(counts["critical"]), str(counts["warning"]), said)
        table.add_row(*row)
    console.print(table)
    console.print(f"{totals['steps']:,} steps: {totals['critical']} critical, {totals['warning']} warnings")
    runs = score_runs(cases, results)
    console.print("Written to", report.save("healthy", {}, {}, runs, **vars(options), totals=dict(totals)))


if __name__ == "__main__":
    main()
