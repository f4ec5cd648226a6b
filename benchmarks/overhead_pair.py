"""The subprocess of `overhead.py`: one variant beside the plain loop, alone with it in its process.

Some tools patch torch for the whole process, and background threads of one would be counted against another.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.overhead_peers import PEERS, quietly
from benchmarks.overhead_training import Step, Training
from benchmarks.overhead_variants import PLAIN, VARIANTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EVERYTHING = VARIANTS | PEERS
WHO, CLOCKS = ("plain", "variant"), ("wall", "processor")
#: Steps before the clock starts: allocators, plans of first steps, one flush. Fewer where a step takes SLOW seconds.
WARM_UP, SLOW = 60, 0.2
#: Steps over which memory may grow, and the seconds that they may take.
GROWTH_STEPS, GROWTH_SECONDS = 1000, 20.0


def timed(variant: str, model: str, *, dtype: str, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds per step of the plain loop and of a variant, one entry a round, by two clocks.

    Args:
        variant: Name of a variant or peer.
        model: Of `overhead_models.CASES`.
        dtype: Of `DTYPES`.
        threads: Of torch.
        rounds: How often each of the two gets its turn.
        seconds: How long a turn of the plain loop lasts, about.
    """
    torch.set_num_threads(threads)
    found: dict[str, list[float]] = {f"{who}_{clock}": [] for who in WHO for clock in CLOCKS}
    with TemporaryDirectory() as folder, ExitStack() as stack, quietly():
        trainings = [Training.of(model, Path(folder), dtype=DTYPES[dtype]) for _ in WHO]
        makers = (VARIANTS[PLAIN], EVERYTHING[variant])
        steps = {who: make(training, stack) for who, make, training in zip(WHO, makers, trainings, strict=True)}
        for step in steps.values():
            _warm_up(step)
        count = max(1, round(seconds / _seconds_of(steps["plain"], 5)))
        for number in range(rounds):
            gc.collect()
            for who in WHO if number % 2 else WHO[::-1]:
                wall, processor = time.perf_counter(), time.process_time()
                for _ in range(count):
                    steps[who]()
                found[f"{who}_processor"].append((time.process_time() - processor) / count)
                found[f"{who}_wall"].append((time.perf_counter() - wall) / count)
    return {"model": model, "dtype": dtype, "threads": threads, "steps_per_turn": count} | found


def footprint(variant: str, model: str) -> dict[str, float]:
    """What a variant takes besides time.

    Returns:
        Resident memory added by attaching and 100 steps, in MB; bytes that a step adds to it afterwards; bytes on disk
        per step; seconds to close.
    """
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, ExitStack() as stack, quietly():
        training = Training.of(model, Path(folder))
        _seconds_of(VARIANTS[PLAIN](training, stack), 20)
        before = _resident()
        step = EVERYTHING[variant](training, stack)
        _seconds_of(step, 100)
        settled = _resident()
        steps, started = 0, time.perf_counter()
        while steps < GROWTH_STEPS and time.perf_counter() - started < GROWTH_SECONDS:
            step()
            steps += 1
        grown = _resident()
        started = time.perf_counter()
        stack.close()
        closing = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {
        "memory_mb": (settled - before) / 1e6,
        "growth_bytes_per_step": (grown - settled) / steps,
        "disk_bytes_per_step": size / (100 + steps),
        "close_seconds": closing,
    }


def _warm_up(step: Step) -> None:
    for _ in range(WARM_UP if _seconds_of(step, 2) < SLOW else 3):
        step()


def _seconds_of(step: Step, times: int) -> float:
    """Mean wall time of a step, in seconds."""
    started = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - started) / times


def _resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Do the jobs that stand in the argument as JSON, print one result a line."""
    warnings.simplefilter("ignore")
    variant, jobs = json.loads(sys.argv[1])
    for job in jobs:
        try:
            result = footprint(variant, **job["footprint"]) if "footprint" in job else timed(variant, **job)
        except Exception as error:  # noqa: BLE001 -- a tool that cannot do a model is a result
            result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
