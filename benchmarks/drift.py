"""Does gradwatch see what no threshold sees? One layer's gradient drifts by 3 % a step in an else healthy run.

    python -m benchmarks.drift

Wanted: found within 60 steps, in the right layer, by the right rule, in every seed, and silence on the twins without.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from benchmarks.casework import report
from benchmarks.casework.recording import record_all
from benchmarks.casework.replaying import Result, replay
from benchmarks.casework.scenarios import SCENARIOS
from benchmarks.casework.scenarios.faulty_bugs import DRIFT_START
from benchmarks.casework.scoring import score_runs

#: Scenario to the rule and the layer that should be named; the layers of the network are modules 0, 2, 4, 6.
WANTED = {"drift-up-3-percent": ("exploding", "2"), "drift-down-3-percent": ("vanishing", "4"), "drift-none": ("", "")}


def steps_to_find(result: Result, rule: str, layer: str) -> int | None:
    """Steps from the start of the drift to the alarm of `rule` whose worst layer is `layer`; None without one."""
    right = [
        alarm.raised for alarm in result.alarms if alarm.finding.rule == rule and alarm.finding.layers[:1] == (layer,)
    ]
    return min(right) - DRIFT_START if right else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, replay, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args(arguments)

    console = Console(width=None if Console().is_terminal else 150)
    cases = [SCENARIOS[name] for name in WANTED]
    record_all(cases, range(options.seeds), progress=lambda line: console.print(line, style="dim", highlight=False))
    table = Table("scenario", "seed", "found after", "all that was said")
    results = [replay(case, seed) for case in cases for seed in range(options.seeds)]
    for result in results:
        rule, layer = WANTED[result.case]
        steps = steps_to_find(result, rule, layer) if rule else None
        said = "; ".join(f"{alarm.raised} {alarm.finding.rule} {alarm.finding.layers}" for alarm in result.alarms)
        table.add_row(result.case, str(result.seed), "-" if steps is None else f"{steps} steps", said)
    console.print(table)
    drifting = [result for result in results if WANTED[result.case][0]]
    times = [steps_to_find(result, *WANTED[result.case]) for result in drifting]
    in_time = sum(steps is not None and 0 <= steps <= 60 for steps in times)
    twins = [result for result in results if not WANTED[result.case][0]]
    silent = sum(not result.alarms for result in twins)
    console.print(f"Found within 60 steps: {in_time} of {len(drifting)}. Silent twins: {silent} of {len(twins)}.")
    runs = score_runs(cases, results)
    path = report.save("drift", {}, {}, runs, seeds=options.seeds, found_in_time=in_time, silent_twins=silent)
    console.print("Written to", path)


if __name__ == "__main__":
    main()
