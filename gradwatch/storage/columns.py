"""An ended stream, turned from rows into columns, with no more memory than the columns take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gradwatch.records import NOT_MEASURED, SKIP_REASONS, STAGES, Ints, StepBatch
from gradwatch.storage.arrow import plain
from gradwatch.storage.layout import GRAD_NORM, Layout, metric_column
from gradwatch.storage.memory import room
from gradwatch.storage.pace import Breather
from gradwatch.storage.stream import codes, list_values, measured, read_layout, record_batches


@dataclass(frozen=True, slots=True)
class Columns:
    """The values of one statistic in a segment, by column.

    Args:
        rows: int64 of shape (k,): which rows of the segment have a sample, ascending.
        values: float32 (metrics: float64) of shape (names, k); `NOT_MEASURED` where absent.
    """

    rows: Ints
    values: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class SegmentColumns:
    """All columns of a segment.

    Args:
        layout: Their names.
        step: int64 of shape (n,).
        stage: Index into `STAGES`, shape (n,).
        skip_reason: Index into `SKIP_REASONS`, shape (n,).
        metrics: float64 of shape (metrics, n), in the layout's order.
        statistics: `grad_norm` and the sampled statistics that have a sample.
    """

    layout: Layout
    step: Ints
    stage: Ints
    skip_reason: Ints
    metrics: npt.NDArray[np.float64]
    statistics: dict[str, Columns]


def read_columns(path: Path) -> SegmentColumns | None:
    """The columns of a stream, up to its first torn or damaged record batch; None when it has no steps.

    Raises:
        RunCorruptError: When not even its schema can be read.
        RunFormatError: When it is not one of ours.
        OSError: When it could not be read a second time as far as the first, which may be for want of memory.
    """
    with pa.OSFile(str(path)) as source:
        layout = read_layout(source)
    names = (GRAD_NORM, *layout.statistics)
    samples = dict.fromkeys(names, 0)
    n = 0
    for rows in _batches(path, layout):
        n += rows.num_rows
        for name in names:
            samples[name] += rows.num_rows - rows.column(name).null_count
    if not n:
        return None
    columns = SegmentColumns(
        layout=dataclasses.replace(layout, statistics=tuple(name for name in layout.statistics if samples[name])),
        step=room(np.int64, n),
        stage=room(np.int8, n),
        skip_reason=room(np.int8, n),
        metrics=room(np.float64, len(layout.metrics), n),
        statistics={
            name: Columns(room(np.int64, k), room(np.float32, len(layout.names(name)), k))
            for name, k in samples.items()
            if k or name == GRAD_NORM
        },
    )
    _fill(columns, path, layout)
    return columns


def _batches(path: Path, layout: Layout) -> Iterator[pa.RecordBatch]:
    """The record batches; read one at a time while iterated over."""
    with pa.OSFile(str(path)) as source:
        yield from record_batches(source, layout)


def _fill(columns: SegmentColumns, path: Path, layout: Layout) -> None:
    breathe = Breather()
    at, filled = 0, dict.fromkeys(columns.statistics, 0)
    for rows in _batches(path, layout):
        end = at + rows.num_rows
        columns.step[at:end] = plain(rows.column("step"))
        columns.stage[at:end] = codes(STAGES, rows.column("stage"))
        columns.skip_reason[at:end] = codes(SKIP_REASONS, rows.column("skip_reason"))
        for i, metric in enumerate(layout.metrics):
            columns.metrics[i, at:end] = measured(rows.column(metric_column(metric)))
        breathe()
        for name, place in filled.items():
            part = list_values(rows.column(name), len(layout.names(name)))
            whole, low, high = columns.statistics[name], place, place + len(part.rows)
            whole.rows[low:high] = part.rows + at
            whole.values[:, low:high] = part.values.T
            filled[name] = high
            breathe()
        at = end
    if at < len(columns.step):
        raise OSError(f"{at} of {len(columns.step)} steps of {path.name} could be read a second time")


def columns_of(batch: StepBatch) -> SegmentColumns:
    """A batch as columns."""
    layout = Layout.of(batch)
    statistics = {GRAD_NORM: Columns(np.arange(len(batch)), np.ascontiguousarray(batch.grad_norm.T))}
    for name, samples in batch.statistics.items():
        if len(samples.rows):
            statistics[name] = Columns(samples.rows, np.ascontiguousarray(samples.values.T))
    return SegmentColumns(
        layout=dataclasses.replace(layout, statistics=tuple(name for name in layout.statistics if name in statistics)),
        step=batch.step,
        stage=batch.stage,
        skip_reason=batch.skip_reason,
        metrics=np.array([batch.metric(name) for name in layout.metrics], np.float64).reshape(-1, len(batch)),
        statistics=statistics,
    )


def take_rows(columns: Columns, rows: Ints) -> npt.NDArray[Any]:
    """The values at `rows` of the segment, shape (names, rows); `NOT_MEASURED` where there is no sample."""
    if len(columns.rows) == len(rows):
        return columns.values
    values = np.full((len(columns.values), len(rows)), NOT_MEASURED, np.float32)
    values[:, np.searchsorted(rows, columns.rows)] = columns.values
    return values
