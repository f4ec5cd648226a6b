"""What watching costs: step times of the same training with and without, paired and interleaved, peers included.

Each variant and each peer runs in a process of its own, beside a copy of the plain loop: in every round both run some
steps, in changing order, and the ratio within the round counts, so load and clock of the machine cancel. Two clocks are
read: wall time, and processor time of the whole process, which also holds the work of background threads and does not
see other processes. The table has medians over rounds with 95 % bootstrap intervals.

    python -m benchmarks.overhead --models mlp transformer --rounds 40
    make bench            # with the peers, each in an environment that its pins allow

Beside the ratios stands the physical limit: the time to read the gradients once at the memory bandwidth measured here,
plus one dispatch of an operation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.overhead_models import CASES
from benchmarks.overhead_pair import CLOCKS, DTYPES
from benchmarks.overhead_peers import PEERS
from benchmarks.overhead_training import Training
from benchmarks.overhead_variants import PLAIN, VARIANTS

RESULTS = Path(__file__).parent / "results" / "overhead.json"
#: Floats of the buffer that the memory bandwidth is measured on: larger than any cache.
BUFFER = 1 << 26

Row = dict[str, Any]


def installed(interpreter: str) -> dict[str, str]:
    """The peers that an environment has, with their versions."""
    code = "import json; from benchmarks.overhead_peers import installed; print(json.dumps(installed()))"
    found: dict[str, str] = json.loads(subprocess.check_output([interpreter, "-c", code], text=True))  # noqa: S603
    return found


def run(interpreter: str, variant: str, jobs: Sequence[Row]) -> Iterator[Row]:
    """Results of jobs of `overhead_pair`, in a new process of that interpreter."""
    command = [interpreter, "-m", "benchmarks.overhead_pair", json.dumps([variant, jobs])]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # noqa: S603
        out, complaints = process.communicate()
    lines = [json.loads(line) for line in out.splitlines()]
    died = complaints.strip().splitlines()[-1:] or ["no reason given"]
    yield from [*lines, *[{"error": died[0]}] * (len(jobs) - len(lines))]


def summarized(found: Row) -> Row:
    """Median step time and ratios to the plain loop, with 95 % intervals of the median by bootstrap over rounds."""
    if "error" in found:
        return found
    row: Row = {"step_ms": 1e3 * float(np.median(found["variant_wall"]))}
    for clock in CLOCKS:
        plain, variant = np.array(found[f"plain_{clock}"]), np.array(found[f"variant_{clock}"])
        ratios = variant / plain
        random = np.random.default_rng(0)
        medians = np.median(random.choice(ratios, (2000, len(ratios))), axis=1)
        row[clock] = float(np.median(ratios))
        row[f"{clock}_low"], row[f"{clock}_high"] = (float(q) for q in np.quantile(medians, (0.025, 0.975)))
        row[f"{clock}_added_us"] = 1e6 * float(np.median(variant - plain))
    return row


def limit(model: str, dtype: str) -> float:
    """Seconds that no monitor of every norm can go below: one read of the gradients, one dispatch."""
    trained = Training.of(model, Path(), dtype=DTYPES[dtype]).trained()
    size = sum(parameter.numel() * parameter.element_size() for _, parameter in trained)
    buffer, one = torch.ones(BUFFER), torch.ones(1)
    bandwidth = buffer.numel() * buffer.element_size() / _fastest(buffer.sum, 5)
    return size / bandwidth + _fastest(one.abs, 2000)


def _fastest(call: Any, times: int) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def table_of(title: str, rows: dict[str, Row], floor: float) -> Table:
    """One model's rows."""
    table = Table(title=title, caption=f"physical limit: {1e6 * floor:.1f} µs added", title_justify="left")
    table.add_column("")
    for name in ("step, ms", "wall", "processor", "added, µs"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, "", row["error"][:40])
            continue
        ratios = [f"{row[c]:.3f} [{row[c + '_low']:.3f}, {row[c + '_high']:.3f}]" for c in CLOCKS]
        table.add_row(name, f"{row['step_ms']:.2f}", *ratios, f"{row['processor_added_us']:.0f}")
    return table


def footprints_of(rows: dict[str, Row]) -> Table:
    """What the variants take besides time."""
    table = Table("", title="Footprint, 200-tensor MLP", title_justify="left")
    for name in ("memory, MB", "growth, bytes a step", "disk, bytes a step", "to close, s"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, row["error"][:40])
        else:
            numbers = ("memory_mb", "growth_bytes_per_step", "disk_bytes_per_step", "close_seconds")
            table.add_row(name, *(f"{row[number]:,.{2 * (number == 'close_seconds')}f}" for number in numbers))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=CASES, default=list(CASES))
    add("--variants", nargs="*", choices=[*VARIANTS, *PEERS], help="all by default")
    add("--rounds", type=int, default=20)
    add("--seconds", type=float, default=0.15, help="length of a turn of the plain loop")
    add("--threads", nargs="+", type=int, default=[1])
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    add(
        "--environments", nargs="+", default=[sys.executable], help="interpreters; a peer runs in the first that has it"
    )
    add("--footprint", action="store_true", help="memory, disk and closing time as well")
    add("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 140)

    homes = dict.fromkeys(VARIANTS, given.environments[0])
    versions: dict[str, str] = {}
    for interpreter in reversed(given.environments):
        versions |= installed(interpreter)
        homes |= dict.fromkeys(installed(interpreter), interpreter)
    names = [n for n in given.variants or [*VARIANTS, *PEERS] if n in homes and n != PLAIN]

    combinations = list(product(given.models, given.threads, given.dtypes))
    jobs: list[Row] = [
        {"model": model, "threads": threads, "dtype": dtype, "rounds": given.rounds, "seconds": given.seconds}
        for model, threads, dtype in combinations
    ]
    if given.footprint:
        jobs.insert(0, {"footprint": {"model": "mlp"}})
    found: dict[str, list[Row]] = {}
    for name in names:
        console.print(f"{name} …", style="dim", highlight=False)
        found[name] = list(run(homes[name], name, jobs))

    footprints = {name: rows.pop(0) for name, rows in found.items()} if given.footprint else {}
    tables = []
    for place, (model, threads, dtype) in enumerate(combinations):
        rows = {name: summarized(found[name][place]) for name in names}
        floor = limit(model, dtype)
        console.print(table_of(f"{model}, threads: {threads}, {dtype}", rows, floor))
        raw = {name: found[name][place] for name in names}
        how = {"model": model, "threads": threads, "dtype": dtype, "limit_us": 1e6 * floor}
        tables.append({**how, "summary": rows, "rounds": raw})
    if footprints:
        console.print(footprints_of(footprints))
    results = {"machine": machine("torch"), "peers": versions, "tables": tables, "footprints": footprints}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
