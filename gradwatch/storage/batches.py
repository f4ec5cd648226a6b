"""Cutting and joining batches of steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from gradwatch.records import Ints, Samples, StepBatch
from gradwatch.storage.layout import Layout


def join(batches: Sequence[StepBatch], layout: Layout) -> StepBatch:
    """Consecutive batches of the same parameters as one; what one of them lacks is `NOT_MEASURED` there."""
    if len(batches) == 1:
        return batches[0]
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    metrics = {name: np.concatenate([batch.metric(name) for batch in batches]) for name in layout.metrics}
    statistics = {name: _join_samples(batches, starts, name) for name in layout.statistics}
    return StepBatch(
        parameters=batches[0].parameters,
        step=np.concatenate([batch.step for batch in batches]),
        grad_norm=np.concatenate([batch.grad_norm for batch in batches]),
        metrics=metrics,
        statistics={name: samples for name, samples in statistics.items() if samples is not None},
        modules=layout.modules,
        stage=np.concatenate([batch.stage for batch in batches]),
        skip_reason=np.concatenate([batch.skip_reason for batch in batches]),
    )


def _join_samples(batches: Sequence[StepBatch], starts: Ints, name: str) -> Samples | None:
    found = [
        (batch.statistics[name], start)
        for batch, start in zip(batches, starts, strict=False)
        if name in batch.statistics
    ]
    if not found:
        return None
    rows = np.concatenate([samples.rows + start for samples, start in found])
    return Samples(rows=rows, values=np.concatenate([samples.values for samples, _ in found]))


def select(batch: StepBatch, rows: Ints) -> StepBatch:
    """The steps at `rows`, ascending."""
    statistics = {}
    for name, samples in batch.statistics.items():
        places = np.searchsorted(rows, samples.rows)
        kept = (places < len(rows)) & (rows[np.minimum(places, len(rows) - 1)] == samples.rows) if len(rows) else []
        statistics[name] = Samples(rows=places[kept], values=samples.values[kept])
    return dataclasses.replace(
        batch,
        step=batch.step[rows],
        grad_norm=batch.grad_norm[rows],
        metrics={name: values[rows] for name, values in batch.metrics.items()},
        statistics=statistics,
        stage=batch.stage[rows],
        skip_reason=batch.skip_reason[rows],
    )


def ascending_runs(steps: Ints) -> list[slice]:
    """Slices within which the steps ascend; nearly always one."""
    breaks = np.flatnonzero(np.diff(steps) <= 0) + 1
    edges = [0, *breaks.tolist(), len(steps)]
    return [slice(low, high) for low, high in itertools.pairwise(edges) if high > low]
