"""How well gradwatch detects sick trainings: recall, quiet, lead, class and cause, on published cases and scenarios.

    python -m benchmarks.detection --suite cases --half dev --list-misses

Runs are trained once and kept (`GRADWATCH_BENCHMARK_CACHE`); rules are replayed over them, one step at a time as live.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console

from benchmarks.casework import report
from benchmarks.casework.case import Case
from benchmarks.casework.recording import FRAMEWORK_VARIABLE, RECORDER_VARIABLE, RECORDERS, record_all
from benchmarks.casework.replaying import replay_all
from benchmarks.casework.scoring import measure, score_rules, score_runs
from benchmarks.casework.suites import CASES_VARIABLE, all_cases, half

#: What can be scored: `core` cases by their label, `stochastic` ones by each run's outcome.
TIERS = ("core", "stochastic")


def main(arguments: Sequence[str] | None = None) -> None:
    """Record what is missing, replay, score, print, save."""
    options = _options(arguments)
    os.environ[FRAMEWORK_VARIABLE] = options.framework
    if options.recorder:
        os.environ[RECORDER_VARIABLE] = options.recorder
    if options.cases:
        os.environ[CASES_VARIABLE] = str(options.cases)
    console = Console(width=None if Console().is_terminal else 150)
    suites = ("cases",) if options.framework == "keras" else ("cases", "scenarios")
    for suite in suites if options.suite == "all" else (options.suite,):
        scored = [case for case in all_cases() if case.suite == suite and case.tier in TIERS]
        chosen = [case for case in half(scored, options.half) if case.tier in options.tiers]
        _run_suite(console, suite, chosen, options)


def _run_suite(console: Console, suite: str, cases: list[Case], options: argparse.Namespace) -> None:
    if options.only:
        cases = [case for case in cases if any(word in case.id for word in options.only)]
    if not cases:
        raise SystemExit(f"No case of suite {suite!r} fits --half, --tiers, --only and --cases.")
    seeds = range(options.seeds)
    record_all(cases, seeds, jobs=options.jobs, progress=lambda line: console.print(line, style="dim", highlight=False))
    runs = score_runs(cases, replay_all(cases, seeds, jobs=options.jobs))
    measured, scores = measure(runs), score_rules(runs)
    name = {"cases": "Published cases", "scenarios": "Own scenarios"}[suite]
    report.show_measures(console, f"{name}, half: {options.half}", measured, runs)
    report.show_peers(console, measured)
    report.show_rules(console, scores)
    if options.list_misses:
        report.show_misses(console, runs)
    seconds, steps = sum(r.result.seconds for r in runs), sum(r.result.outcome.steps for r in runs)
    console.print(f"\nReplayed {steps:,} steps, {1e6 * seconds / max(1, steps):.0f} µs a step, all rules together.")
    if not options.only:
        file = f"detection-{'keras-' if options.framework == 'keras' else ''}{suite}-{options.half}"
        facts = {"suite": suite, "half": options.half, "seeds": options.seeds, "framework": options.framework}
        path = report.save(file, measured, scores, runs, **facts)
        console.print(f"Written to {path}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=("cases", "scenarios", "all"), default="all")
    add("--half", choices=("dev", "held", "all"), default="all", help="by sorted ids: even places are dev")
    add("--seeds", type=int, default=3, help="seeds 0 to N-1 of each case")
    add("--jobs", type=int, default=1, help="processes")
    add("--tiers", nargs="+", default=["core"], choices=TIERS, help="of the published cases")
    add("--cases", type=Path, help="another directory of specifications")
    add("--only", nargs="+", metavar="WORD", help="only cases whose id contains one of these; nothing is saved")
    add("--list-misses", action="store_true", help="every miss and false alarm with its evidence")
    add("--recorder", choices=tuple(RECORDERS), help="gradwatch itself, or the plain recorder it can be held against")
    add("--framework", choices=("torch", "keras"), default="torch", help="in which the runs are trained; keras: cases")
    options = parser.parse_args(arguments)
    if options.framework == "keras" and options.suite == "scenarios":
        parser.error("the scenarios are PyTorch trainings; only --suite cases can be trained in Keras")
    return options


if __name__ == "__main__":
    main()
