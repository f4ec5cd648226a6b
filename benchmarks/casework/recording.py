"""Recorded runs on disk: trained once, replayed as often as the rules change."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.casework.case import Case, Losses, Outcome, Training
from benchmarks.casework.recorder import Recorder
from benchmarks.casework.training import run
from gradwatch.records import Parameter, Samples, StepBatch

#: To be raised when what a run holds changes without its case changing: the recorders, the trainings' shared code.
VERSION = 3
#: Which recorder measures: `watch` is gradwatch as a user has it, `activations` with
#: `activations=True`, `plain` the independent one it can be held against.
RECORDER_VARIABLE = "GRADWATCH_BENCHMARK_RECORDER"
#: In which framework the runs are trained: `torch`, or `keras` (published cases only).
FRAMEWORK_VARIABLE = "GRADWATCH_BENCHMARK_FRAMEWORK"
CACHE_VARIABLE = "GRADWATCH_BENCHMARK_CACHE"


def cache_directory() -> Path:
    """Where recorded runs are kept: `GRADWATCH_BENCHMARK_CACHE`, or a folder of the user's cache."""
    return Path(os.environ.get(CACHE_VARIABLE, Path.home() / ".cache" / "gradwatch" / "benchmarks"))


def recorder_name() -> str:
    """The recorder in use."""
    return os.environ.get(RECORDER_VARIABLE, "plain")


def framework_name() -> str:
    """The framework in use."""
    return os.environ.get(FRAMEWORK_VARIABLE, "torch")


def path_of(case: Case, seed: int) -> Path:
    """The file of a run; its name holds a hash of everything that the numbers in it depend on."""
    in_keras = framework_name() == "keras"
    depends = [_keras_code(), version("keras")] if in_keras else [torch.__version__]
    content = json.dumps([case.fingerprint, seed, VERSION, *depends])
    digest = hashlib.sha256(content.encode()).hexdigest()[:10]
    folder = "keras" if in_keras else recorder_name()
    return cache_directory() / folder / case.suite / f"{case.id}.s{seed}.{digest}.npz"


@functools.cache
def _keras_code() -> str:
    from benchmarks.casework import fingerprint, keras_networks, keras_runs

    return fingerprint.of_modules(keras_networks, keras_runs)


def record(case: Case, seed: int) -> Path:
    """The file of a run, trained now unless it is there."""
    path = path_of(case, seed)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    started = time.process_time()
    batch, losses = _measured(case, seed)
    facts = {"id": case.id, "seed": seed, "suite": case.suite, "seconds": time.process_time() - started}
    save(path, batch, losses, facts)
    for old in path.parent.glob(f"{case.id}.s{seed}.*.npz"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _measured(case: Case, seed: int) -> tuple[StepBatch, Losses]:
    if framework_name() == "torch":
        return RECORDERS[recorder_name()](case.build(seed))
    from benchmarks.casework import keras_runs

    if case.spec is None:
        raise ValueError(f"only published cases can be trained in Keras: {case.id!r}")
    return keras_runs.watched(case.spec, seed)


def watched(training: Training, *, activations: bool = False) -> tuple[StepBatch, Losses]:
    """What `gradwatch.watch` records of the run, and the losses as the loop saw them."""
    import gradwatch as gw
    from gradwatch.reader import RunReader

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        with gw.watch(
            training.model, training.optimizer, run_dir=run_dir, detectors=[], activations=activations
        ) as watcher:
            losses = run(training, lambda loss: watcher.log(loss=loss))
        return joined(list(RunReader(run_dir).batches(1_000_000))), losses


def plain(training: Training) -> tuple[StepBatch, Losses]:
    """What the independent recorder measures."""
    recorder = Recorder(training.model, training.optimizer)
    losses = run(training, recorder.log)
    return recorder.batch(), losses


RECORDERS: dict[str, Callable[[Training], tuple[StepBatch, Losses]]] = {
    "watch": watched,
    "activations": functools.partial(watched, activations=True),
    "plain": plain,
}


def joined(batches: Sequence[StepBatch]) -> StepBatch:
    """Consecutive batches as one; what one of them lacks is `NOT_MEASURED` there."""
    last = batches[-1]
    starts = np.cumsum([0, *map(len, batches)])
    samples: dict[str, list[tuple[int, Samples]]] = defaultdict(list)
    for start, batch in zip(starts[:-1], batches, strict=True):
        for name, found in batch.statistics.items():
            samples[name].append((int(start), found))
    return StepBatch(
        parameters=last.parameters,
        step=np.concatenate([batch.step for batch in batches]),
        grad_norm=np.concatenate([batch.grad_norm for batch in batches]),
        metrics={
            name: np.concatenate([batch.metric(name) for batch in batches])
            for name in sorted({name for batch in batches for name in batch.metrics})
        },
        statistics={
            name: Samples(
                np.concatenate([part.rows + start for start, part in parts]),
                np.concatenate([part.values for _, part in parts]),
            )
            for name, parts in samples.items()
        },
        modules=last.modules,
        stage=np.concatenate([batch.stage for batch in batches]),
        skip_reason=np.concatenate([batch.skip_reason for batch in batches]),
    )


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


def save(path: Path, batch: StepBatch, losses: Losses, facts: dict[str, Any]) -> None:
    """Write a batch, the losses of the loop and some facts as one file; complete or not there."""
    arrays: dict[str, Any] = {name: getattr(batch, name) for name in ("step", "grad_norm", "stage", "skip_reason")}
    arrays |= {f"metric/{name}": values for name, values in batch.metrics.items()}
    for name, samples in batch.statistics.items():
        arrays |= {f"rows/{name}": samples.rows, f"values/{name}": samples.values}
    parameters = [dataclasses.asdict(parameter) for parameter in batch.parameters]
    facts = {**facts, "parameters": parameters, "modules": batch.modules}
    unfinished = path.with_suffix(".tmp.npz")
    np.savez_compressed(unfinished, **arrays, losses=losses, facts=np.array(json.dumps(facts)))
    unfinished.replace(path)


@dataclass(frozen=True)
class Recorded:
    """What `save` wrote."""

    batch: StepBatch
    losses: Losses
    facts: dict[str, Any]


def load(path: str | Path) -> Recorded:
    """A recorded run."""
    with np.load(path) as file:
        arrays = dict(file)
    facts = json.loads(str(arrays["facts"]))

    def named(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    values = named("values/")
    batch = StepBatch(
        parameters=tuple(Parameter(**parameter) for parameter in facts.pop("parameters")),
        metrics=named("metric/"),
        statistics={name: Samples(rows, values[name]) for name, rows in named("rows/").items()},
        modules=tuple(facts.pop("modules")),
        **{name: arrays[name] for name in ("step", "grad_norm", "stage", "skip_reason")},
    )
    return Recorded(batch, arrays["losses"], facts)


def load_batches(path: str | Path) -> list[StepBatch]:
    """The steps of a recorded run, one batch a step, as a live run feeds its detectors."""
    return list(load(path).batch.split(1))


def outcome_of(case: Case, seed: int, path: str | Path) -> Outcome:
    """How a recorded run of `case` ended."""
    return case.judge(load(path).losses, seed)


def truth(path: str | Path) -> dict[str, Any]:
    """What is known of a recorded run besides its steps: its label and how it ended."""
    from benchmarks.casework.suites import case_by_id

    found = load(path)
    case = case_by_id(found.facts["id"])
    outcome = case.judge(found.losses, found.facts["seed"])
    label = {name: getattr(case, name) for name in ("tier", "classes", "faulty", "rules", "causes", "sudden")}
    return {**found.facts, **label, **dataclasses.asdict(outcome), "stuck": outcome.stuck}
