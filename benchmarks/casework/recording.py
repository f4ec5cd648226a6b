"""Recorded runs on disk: trained once, replayed as often as the rules change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.casework.case import Case, Outcome
from benchmarks.casework.recorder import Recorder
from benchmarks.casework.training import run
from gradwatch.records import Parameter, Samples, StepBatch

#: To be raised when what a run holds changes without its case changing: the recorder, the trainings' shared code.
VERSION = 2


def cache_directory() -> Path:
    """Where recorded runs are kept: `GRADWATCH_BENCHMARK_CACHE`, or a folder of the user's cache."""
    fallback = Path.home() / ".cache" / "gradwatch" / "benchmarks"
    return Path(os.environ.get("GRADWATCH_BENCHMARK_CACHE", fallback))


def path_of(case: Case, seed: int) -> Path:
    """The file of a run; its name holds a hash of everything that the numbers in it depend on."""
    content = json.dumps([case.fingerprint, seed, VERSION, torch.__version__])
    digest = hashlib.sha256(content.encode()).hexdigest()[:10]
    return cache_directory() / case.suite / f"{case.id}.s{seed}.{digest}.npz"


def record(case: Case, seed: int) -> Path:
    """The file of a run, trained now unless it is there."""
    path = path_of(case, seed)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    started = time.process_time()
    training = case.build(seed)
    recorder = Recorder(training.model, training.optimizer)
    run(training, recorder.log)
    facts = {"id": case.id, "seed": seed, "suite": case.suite, "seconds": time.process_time() - started}
    save(path, recorder.batch(), facts)
    for old in path.parent.glob(f"{case.id}.s{seed}.*.npz"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def record_all(
    cases: Iterable[Case], seeds: Iterable[int], *, jobs: int = 1, progress: Callable[[str], None] = print
) -> None:
    """Record all runs that are not there yet, the cheap ones first, in `jobs` processes."""
    todo = [(case, seed) for case in sorted(cases, key=lambda case: case.cost) for seed in seeds]
    todo = [(case, seed) for case, seed in todo if not path_of(case, seed).exists()]
    started = time.perf_counter()
    if jobs == 1:
        done: Iterable[object] = (record(case, seed) for case, seed in todo)
    else:
        pool = ProcessPoolExecutor(jobs)
        done = pool.map(_record_by_name, [case.id for case, _ in todo], [seed for _, seed in todo])
    for number, ((case, seed), _) in enumerate(zip(todo, done, strict=True), start=1):
        progress(f"recorded {number}/{len(todo)}: {case.id} seed {seed}, {time.perf_counter() - started:.0f} s")


def _record_by_name(name: str, seed: int) -> None:
    from benchmarks.casework.suites import case_by_id

    record(case_by_id(name), seed)


def save(path: Path, batch: StepBatch, facts: dict[str, Any]) -> None:
    """Write a batch and some facts as one file; complete or not there."""
    arrays: dict[str, Any] = {"step": batch.step, "grad_norm": batch.grad_norm}
    arrays |= {f"metric/{name}": values for name, values in batch.metrics.items()}
    for name, samples in batch.statistics.items():
        arrays |= {f"rows/{name}": samples.rows, f"values/{name}": samples.values}
    parameters = [dataclasses.asdict(parameter) for parameter in batch.parameters]
    arrays["facts"] = json.dumps({**facts, "parameters": parameters, "modules": batch.modules})
    unfinished = path.with_suffix(".tmp.npz")
    np.savez_compressed(unfinished, **arrays)
    unfinished.replace(path)


def load(path: str | Path) -> tuple[StepBatch, dict[str, Any]]:
    """What `save` wrote."""
    with np.load(path) as file:
        arrays = dict(file)
    facts = json.loads(str(arrays.pop("facts")))

    def named(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    values = named("values/")
    batch = StepBatch(
        parameters=tuple(Parameter(**parameter) for parameter in facts.pop("parameters")),
        step=arrays["step"],
        grad_norm=arrays["grad_norm"],
        metrics=named("metric/"),
        statistics={name: Samples(rows, values[name]) for name, rows in named("rows/").items()},
        modules=tuple(facts.pop("modules")),
    )
    return batch, facts


def load_batches(path: str | Path) -> list[StepBatch]:
    """The steps of a recorded run, one batch a step, as a live run feeds its detectors."""
    return list(load(path)[0].split(1))


def outcome_of(case: Case, seed: int, path: str | Path) -> Outcome:
    """How the recorded run of `case` ended."""
    return case.judge(np.asarray(load(path)[0].metrics["loss"], np.float64), seed)


def truth(path: str | Path) -> dict[str, Any]:
    """What is known of a recorded run besides its steps: its label and how it ended."""
    from benchmarks.casework.suites import case_by_id

    batch, facts = load(path)
    case = case_by_id(facts["id"])
    outcome = case.judge(np.asarray(batch.metrics["loss"], np.float64), facts["seed"])
    label = {name: getattr(case, name) for name in ("tier", "classes", "faulty", "rules", "causes")}
    return {**facts, **label, **dataclasses.asdict(outcome), "stuck": outcome.stuck}
