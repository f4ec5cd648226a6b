"""Makes every call of gradwatch fail, one at a time, in real trainings; prints a table, writes JSON.

    python -m benchmarks.faults --injections 10000 --work results/   # goes on where an earlier call was stopped
    python -m benchmarks.faults --part process --injections 600      # at the end of the interpreter, in a forked child
    KERAS_BACKEND=jax python -m benchmarks.faults --part keras --injections 200

A training is watched with everything on, and once in it a call of ours fails: by an ordinary exception, out of memory,
by an error of the system, twice in a row, by an interrupt, or it hangs (in our own threads). Which calls there are is
found by tracing a run, see `benchmarks/faultwork`. The training must go on bit-identical to an unwatched one, the fault
be logged and counted, the record be whole enough to read, and nothing be left behind. A short campaign of the same kind
is in `tests/faults`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faultwork.campaign import Stage, chosen
from benchmarks.machine import machine

RESULTS = Path("benchmarks/results")
#: Where faults come.
PARTS = ("loop", "process", "keras")


def staged(part: str) -> Stage:
    """The stage of a part."""
    if part == "process":
        from benchmarks.faultwork.processes import Processes

        return Processes()
    if part == "keras":
        from benchmarks.faultwork.keras_play import KerasStage

        return KerasStage()
    return Stage()


def campaign(stage: Stage, injections: int, seed: int, kept: Path | None) -> list[dict[str, Any]]:
    """Play so many injections, but for those whose outcome is in the file already.

    Args:
        stage: Where; closed in the end.
        injections: How many.
        seed: Of the choice.
        kept: One JSON object a line; added to.
    """
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept is not None and kept.exists() else []
    try:
        sites = {name: stage.sites(name) for name in stage.plain}
        for number, injection in enumerate(itertools.islice(chosen(sites, seed), injections)):
            if number < len(done):
                continue
            outcome = stage.inject(injection)
            site = injection.site
            told = {"number": number, **dataclasses.asdict(injection), "site": site._asdict()}
            done.append({**told, **{key: outcome[key] for key in ("fired", "foreseen", "wrong", "failures")}})
            if outcome["wrong"]:
                print(f"{number}: {injection.scene}, {site}, {injection.kind}: {outcome['wrong']}", flush=True)
            if kept is not None:
                with kept.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    finally:
        stage.close()
    return done


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a campaign."""
    fired = [each for each in done if each["fired"]]
    wrong = Counter(what.partition(":")[0] for each in fired for what in each["wrong"])
    return {
        "planned": len(done),
        "injected": len(fired),
        "functions": len({(each["site"]["file"], each["site"]["function"]) for each in fired}),
        "by kind": Counter(each["kind"] for each in fired),
        "by moment": Counter(each["site"]["moment"] for each in fired),
        "in threads": sum(each["site"]["thread"] != "main" for each in fired),
        "foreseen": sum(each["foreseen"] for each in fired),
        "clean": sum(not each["wrong"] for each in fired),
        "wrong": wrong,
    }


def main() -> int:
    """Run the campaign; 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, default=10_000)
    parser.add_argument("--part", choices=PARTS, default="loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder that keeps the outcomes, so that the campaign can go on")
    options = parser.parse_args()
    threading.excepthook = lambda _: None  # what ends a thread is found by what it leaves undone
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    name = {"loop": "faults", "keras": f"faults-keras-{os.environ.get('KERAS_BACKEND', 'tensorflow')}"}.get(
        options.part, f"faults-{options.part}"
    )
    kept = options.work and options.work / f"{name}-{options.seed}.jsonl"
    done = campaign(staged(options.part), options.injections, options.seed, kept)
    found = summary(done)
    for name, value in found.items():
        print(f"{name:>12}  {dict(value) if isinstance(value, Counter) else value}")
    worst = [each for each in done if each["wrong"]]
    result = {**machine("torch"), "seed": options.seed, **found, "cases": worst[:50]}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
