"""What the detectors cost: microseconds a step for all rules together, and milliseconds when a finding opens.

    python -m benchmarks.detector_cost

One core. Live monitors feed one step at a time, replays a thousand. Medians over repeats of the same stream; the budget
is 150 microseconds a step at 1,000 parameters and 20 milliseconds for a diagnosis.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.catalogue import CATALOGUE
from gradwatch.detectors.engine import Engine
from gradwatch.detectors.signals import Signals
from gradwatch.records import Parameter, Samples, StepBatch

STEPS = 2000
SICK_FROM = 1000


def parameters(count: int) -> tuple[Parameter, ...]:
    """Weights and biases of layers in order of depth."""
    shapes = (("weight", (64, 64)), ("bias", (64,)))
    return tuple(
        Parameter(f"layer{i // 2}.{shapes[i % 2][0]}", shape=shapes[i % 2][1], depth=i // 2, activation="ReLU")
        for i in range(count)
    )


def stream(count: int, *, sick: bool, seed: int = 0) -> StepBatch:
    """A healthy run of `STEPS` steps, statistics at every tenth; if `sick`, half the layers explode at its middle."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(0, 0.2, (STEPS, count)))
    if sick:
        norms[SICK_FROM:, : count // 2] *= 1000
    rows = np.arange(0, STEPS, 10)
    ratio = 1e-3 * np.exp(rng.normal(0, 0.2, (len(rows), count)))
    values = {"weight_norm": np.ones_like(ratio), "update_ratio": ratio, "zero_fraction": np.zeros_like(ratio)}
    return StepBatch(
        parameters=parameters(count),
        step=np.arange(STEPS),
        grad_norm=norms.astype(np.float32),
        metrics={
            "loss": 0.2 + 2 * np.exp(-np.arange(STEPS) / 300) + rng.normal(0, 0.02, STEPS),
            "lr": np.full(STEPS, 1e-3),
        },
        statistics={name: Samples(rows, array.astype(np.float32)) for name, array in values.items()},
    )


def cost(batch: StepBatch, size: int, *, detectors: Any = "default", repeats: int = 5) -> float:
    """Median microseconds a step when fed in batches of `size`."""
    parts = list(batch.split(size))
    times = []
    for _ in range(repeats):
        engine = Engine(detectors, RunContext(batch.parameters))
        started = time.process_time()
        for part in parts:
            engine.update(part)
        times.append(1e6 * (time.process_time() - started) / len(batch))
    return float(np.median(times))


def opening(batch: StepBatch) -> float:
    """Milliseconds that the dearest step takes: that at which findings open and are diagnosed."""
    engine = Engine("default", RunContext(batch.parameters))
    times = []
    for part in batch.split(1):
        started = time.perf_counter()
        if engine.update(part):
            times.append(1e3 * (time.perf_counter() - started))
    return max(times)


def shares(batch: StepBatch) -> dict[str, float]:
    """Microseconds a step of each rule, beyond what all share."""
    signals, rules = Signals(), [rule() for rule in CATALOGUE.values()]
    context = RunContext(batch.parameters)
    signals.begin(context)
    for rule in rules:
        rule.start(context)
    spent = dict.fromkeys(CATALOGUE, 0.0)
    started = time.perf_counter()
    for part in batch.split(1):
        for now in signals.advance(part):
            for rule in rules:
                before = time.perf_counter()
                rule.step(now)
                spent[rule.rule] += time.perf_counter() - before
    spent["shared"] = time.perf_counter() - started - sum(spent.values())
    return {name: 1e6 * seconds / len(batch) for name, seconds in spent.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    numbers: dict[str, Any] = {}
    print("parameters   healthy, 1  healthy, 1000    sick, 1  sick, 1000  opening ms")
    for count in options.parameters:
        well, sick = stream(count, sick=False), stream(count, sick=True)
        row = [cost(batch, size) for batch in (well, sick) for size in (1, 1000)] + [opening(sick)]
        numbers[str(count)] = row
        print(f"{count:>10} {row[0]:>9.0f} µs {row[1]:>11.0f} µs {row[2]:>7.0f} µs {row[3]:>8.0f} µs {row[4]:>11.1f}")
    print("\nEach rule at 1,000 parameters, one step at a time, microseconds:")
    for name, value in sorted(shares(stream(1000, sick=False)).items(), key=lambda item: -item[1]):
        print(f"  {name:14} {value:6.1f}")
    if options.out:
        options.out.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
