"""For tests of your own: synthetic runs of any size, written fast, healthy or with a known fault.

Examples:
    >>> import tempfile
    >>> from gradwatch.reader import RunReader
    >>> run = RunReader(write_run(tempfile.mkdtemp() + "/run", steps=500, parameters=8, scenario="spike"))
    >>> int(run.grad_norms().max(axis=1).idxmax())
    250
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import METRICS, NOT_MEASURED, ActionRecord, Finding, Parameter, RunInfo, Samples, StepBatch

Array = npt.NDArray[np.float32]

#: What may be wrong with a synthetic run. `exploding` grows from 60 % of the run on until it overflows; in `vanishing`
#: the layers near the input fade; `spike` is one step at half the run; `nan` begins in one layer at 70 %; `dead`
#: silences a layer at 40 %.
SCENARIOS = ("healthy", "exploding", "vanishing", "spike", "nan", "dead")
#: Steps that are drawn at a time: part of what a seed means.
_CHUNK = 4096
#: Steps that are appended at a time.
_PIECE = 500


def synthetic_parameters(count: int) -> tuple[Parameter, ...]:
    """`count` parameters: weights and biases of layers in order of depth.

    Examples:
        >>> [parameter.name for parameter in synthetic_parameters(3)]
        ['layers.0.weight', 'layers.0.bias', 'layers.1.weight']
    """
    if count < 0:
        raise ConfigurationError.of("parameters", ">= 0", count)
    shapes = (("weight", (64, 64)), ("bias", (64,)))
    return tuple(
        Parameter(f"layers.{i // 2}.{name}", shape=shape, depth=i // 2, kind="Linear", activation="ReLU")
        for i in range(count)
        for name, shape in [shapes[i % 2]]
    )


def synthetic_batches(
    *,
    steps: int,
    parameters: int | Sequence[Parameter],
    seed: int = 0,
    scenario: str = "healthy",
    first_step: int = 0,
    statistics: Iterable[str] = (),
    stats_every: int = 10,
    metrics: Mapping[str, float] | None = None,
) -> Iterator[StepBatch]:
    """The steps of a run in batches; the same arguments give the same numbers.

    Norms are log-normal around a level per parameter, decay as training does, and share a part of their noise, as those
    of one mini-batch do.

    Args:
        steps: How many.
        parameters: How many, or which.
        seed: Of the random numbers.
        scenario: One of `SCENARIOS`.
        first_step: Number of the first step.
        statistics: Parameter statistics to sample as well.
        stats_every: Their interval in steps.
        metrics: Further metrics and their levels.

    Raises:
        UnknownNameError: For an unknown scenario.
        ConfigurationError: When `steps` or `parameters` is negative.
    """
    if scenario not in SCENARIOS:
        raise UnknownNameError.among("scenario", scenario, SCENARIOS)
    if steps < 0:
        raise ConfigurationError.of("steps", ">= 0", steps)
    columns = synthetic_parameters(parameters) if isinstance(parameters, int) else tuple(parameters)
    levels = _Levels(columns, seed)
    for low in range(0, steps, _CHUNK):
        rng = np.random.default_rng([seed, low])
        place = np.arange(low, min(low + _CHUNK, steps))
        norms = levels.norms(place / steps, rng)
        afflict(norms, place / steps, scenario=scenario, once=place == steps // 2)
        numbers = _metrics(norms, place / steps, rng)
        numbers |= {name: level * rng.lognormal(0, 0.1, len(place)) for name, level in (metrics or {}).items()}
        rows = np.flatnonzero(place % stats_every == 0)
        sampled = {
            name: Samples(rows, levels.norms(place[rows] / steps, rng) * _SCALE.get(name, 1)) for name in statistics
        }
        yield StepBatch(columns, place + first_step, norms, numbers, sampled if len(rows) else {})


#: Typical sizes of sampled statistics, relative to a gradient norm.
_SCALE = {"weight_norm": np.float32(20), "update_ratio": np.float32(0.01), "grad_max": np.float32(0.2)}


class _Levels:
    """Where the norm of each parameter lies, and how it moves.

    Args:
        parameters: The p parameters.
        seed: Of the random numbers.
    """

    def __init__(self, parameters: Sequence[Parameter], seed: int) -> None:
        rng = np.random.default_rng(seed)
        p = len(parameters)
        biases = np.array([parameter.name.endswith("bias") for parameter in parameters], bool)
        self._level = (rng.normal(-1.5, 0.6, p) - 1.5 * biases).astype(np.float32)
        self._phase, self._pace = (
            rng.uniform(0, 2 * np.pi, p).astype(np.float32),
            rng.uniform(2, 12, p).astype(np.float32),
        )

    def norms(self, progress: npt.NDArray[np.float64], rng: np.random.Generator) -> Array:
        """Norms of shape (n, p), at shares `progress` of the run."""
        time = progress.astype(np.float32)[:, None]
        logs = rng.standard_normal((len(time), len(self._level)), np.float32)
        logs *= np.float32(0.25)
        logs += rng.standard_normal((len(time), 1), np.float32) * np.float32(0.15)
        logs += self._level + np.float32(0.15) * np.sin(self._phase + self._pace * time)
        logs -= np.float32(1.2) * (1 - np.exp(-6 * time))
        return np.exp(logs, out=logs)


def afflict(norms: Array, progress: npt.NDArray[np.float64], *, scenario: str, once: npt.NDArray[np.bool_]) -> None:
    """Bring the fault of a scenario into norms of shape (n, p), in place.

    Args:
        norms: In order of depth.
        progress: Share of the run of each step, shape (n,).
        scenario: One of `SCENARIOS`.
        once: The step of a `spike`, bool of shape (n,).
    """
    p = norms.shape[1]
    victim = slice(p // 3, p // 3 + max(1, p // 10))
    with np.errstate(over="ignore", invalid="ignore"):
        if scenario == "exploding":
            norms *= np.exp(np.clip(progress - 0.6, 0, None) * 300).astype(np.float32)[:, None]
            norms[progress > 0.95] = np.nan
        elif scenario == "vanishing":
            fade = np.linspace(12, 0, p)[None, :] * np.clip(progress * 2, 0, 1)[:, None]
            norms *= (10.0**-fade).astype(np.float32)
        elif scenario == "spike":
            norms[once] *= np.float32(300)
        elif scenario == "nan":
            norms[progress >= 0.7, victim] = np.nan
            norms[progress >= 0.72] = np.nan
        elif scenario == "dead":
            norms[progress >= 0.4, victim] = 0


def _metrics(
    norms: Array, progress: npt.NDArray[np.float64], rng: np.random.Generator
) -> dict[str, npt.NDArray[np.float64]]:
    n = len(progress)
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sqrt(np.sum(np.square(norms, dtype=np.float64), axis=1))
    usual = max(1e-3, 0.3 * math.sqrt(norms.shape[1]))
    harm = np.clip(np.log10(np.maximum(total, 1e-30) / usual), 0, 30)
    found = {name: np.full(n, NOT_MEASURED) for name in METRICS}
    found["time"] = 1.7e9 + progress * 3600
    found["step_time"], found["hook_time"] = rng.lognormal(-3, 0.1, n), rng.lognormal(-10, 0.2, n)
    found["loss"] = 2.3 * np.exp(-3 * progress) * rng.lognormal(0, 0.05, n) * 10**harm + 0.05
    found["lr"] = 0.1 * 0.5 * (1 + np.cos(np.pi * progress))
    found["lr_factor"], found["clip_coefficient"], found["skipped"] = np.ones(n), np.ones(n), np.zeros(n)
    found["global_norm"] = total
    return found


def write_run(
    path: str | os.PathLike[str],
    *,
    steps: int,
    parameters: int | Sequence[Parameter],
    seed: int = 0,
    scenario: str = "healthy",
    status: str = "finished",
    findings: Iterable[Finding] = (),
    actions: Iterable[ActionRecord] = (),
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Path:
    """Write a synthetic run as a training would have, a few million values a second.

    Args:
        path: The run directory.
        steps: How many.
        parameters: How many, or which.
        seed: Of the random numbers.
        scenario: One of `SCENARIOS`.
        status: What run.json says in the end: `finished`, `crashed`, or `running` (which reads as crashed).
        findings: To be recorded.
        actions: To be recorded.
        config: Settings of the watcher that might have written it.
        overwrite: Replace a run that is there.
        settings: Of `synthetic_batches`.

    Returns:
        The path.

    Raises:
        RunExistsError: When there is a run, without `overwrite`.
    """
    from gradwatch.storage.events import encode_event
    from gradwatch.storage.store import Store

    columns = synthetic_parameters(parameters) if isinstance(parameters, int) else tuple(parameters)
    place = Path(path)
    info = RunInfo(
        columns,
        started=1.7e9,
        heartbeat=1.7e9 + 3600,
        framework="synthetic",
        host="synthetic",
        pid=1,
        config=config or {},
    )
    store = Store(place, info, overwrite=overwrite)
    try:
        for batch in synthetic_batches(steps=steps, parameters=columns, seed=seed, scenario=scenario, **settings):
            for piece in batch.split(_PIECE):
                store.append(piece)
                if store.is_full:
                    store.end_segment()
                    store.seal()
        for kind, items in (("finding", findings), ("action", actions)):
            for item in items:
                store.append_events(encode_event(kind, item.to_json()))
        store.finish(status, "synthetic" if status == "crashed" else "", now=1.7e9 + 3600)
    finally:
        store.release()
    return place
