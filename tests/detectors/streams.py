"""Streams of steps for the detectors' tests: synthetic norms with a known course."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.engine import Engine
from gradwatch.records import Finding, Parameter, Samples, StepBatch

Array = npt.NDArray[Any]


def chain(
    layers: int, *, activation: str = "ReLU", kind: str = "Linear", dtype: str = "float32"
) -> tuple[Parameter, ...]:
    """One weight matrix a layer, in order of depth."""
    return tuple(
        Parameter(f"layer{i}.weight", shape=(16, 16), depth=i, activation=activation, kind=kind, dtype=dtype)
        for i in range(layers)
    )


def noisy(steps: int, layers: int, *, seed: int = 0, level: float = 1.0, spread: float = 0.2) -> Array:
    """Log-normal norms around `level`, shape (steps, layers); half of the noise is shared by all layers of a step."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(0, spread, (steps, 1)), rng.normal(0, spread, (steps, layers))
    norms: Array = level * np.exp((shared + own) / np.sqrt(2))
    return norms


def falling(steps: int, *, seed: int = 0, start: float = 2.0, end: float = 0.3) -> Array:
    """A loss that falls from `start` to `end` with some noise, shape (steps,)."""
    rng = np.random.default_rng(seed)
    course = end + (start - end) * np.exp(-np.arange(steps) / (steps / 4))
    return course * np.exp(rng.normal(0, 0.05, steps))


def batch(
    norms: Array,
    *,
    parameters: Sequence[Parameter] | None = None,
    every: int = 10,
    statistics: Mapping[str, Array] | None = None,
    modules: Sequence[str] = (),
    skip_reason: Array | None = None,
    first: int = 0,
    **metrics: Array,
) -> StepBatch:
    """Steps with these norms; `statistics` have a row for every `every` steps."""
    steps = len(norms)
    rows = np.arange(0, steps, every)
    return StepBatch(
        parameters=tuple(parameters or chain(norms.shape[1])),
        step=first + np.arange(steps),
        grad_norm=norms.astype(np.float32),
        metrics={name: np.broadcast_to(np.asarray(values, float), (steps,)) for name, values in metrics.items()},
        statistics={name: Samples(rows, np.asarray(v, np.float32)) for name, v in (statistics or {}).items()},
        modules=tuple(modules),
        skip_reason=np.zeros(steps, np.int8) if skip_reason is None else skip_reason.astype(np.int8),
    )


def found(steps: StepBatch, detectors: str | Sequence[str] = "default", *, size: int = 7) -> dict[str, list[Finding]]:
    """Rule to its findings in their final state, the steps fed in batches of `size`."""
    engine = Engine(detectors, RunContext(steps.parameters, framework="torch"))
    final: dict[str, Finding] = {}
    for part in steps.split(size):
        final.update((finding.id, finding) for finding in engine.update(part))
    final.update((finding.id, finding) for finding in engine.open_findings)
    by_rule: dict[str, list[Finding]] = {}
    for finding in final.values():
        by_rule.setdefault(finding.rule, []).append(finding)
    return by_rule


def alarms(by_rule: Mapping[str, Iterable[Finding]]) -> dict[str, list[Finding]]:
    """Those of severity warning or critical."""
    grave = {rule: [f for f in findings if f.severity != "info"] for rule, findings in by_rule.items()}
    return {rule: findings for rule, findings in grave.items() if findings}
