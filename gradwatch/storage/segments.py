"""The sealed segment: Parquet, one float32 column per parameter and statistic."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gradwatch.errors import RunCorruptError
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, STAGES, Floats, Ints, Parameter, Samples, StepBatch
from gradwatch.storage.arrow import numbers, plain, strings
from gradwatch.storage.layout import GRAD_NORM, Layout, metric_column
from gradwatch.storage.stream import codes, measured, nullable

#: How long Python code runs at a stretch, and how long it then lets the training thread have the interpreter (seconds).
_STRETCH, _BREATH = 3e-4, 5e-5
#: What a damaged Parquet file may raise.
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, EOFError)

Table = npt.NDArray[np.float32]


class Breather:
    """Gives the interpreter away every fraction of a millisecond, so that the training thread never waits for long.

    Without it a busy thread keeps the interpreter for a whole switch interval, five milliseconds.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def __call__(self) -> None:
        """Pause if the stretch is over."""
        if time.perf_counter() - self._since > _STRETCH:
            time.sleep(_BREATH)
            self._since = time.perf_counter()


@dataclass(frozen=True, slots=True)
class Columns:
    """The values of one statistic in a segment, by column.

    Args:
        rows: int64 of shape (k,): which rows of the segment have a sample, ascending.
        values: float32 of shape (names, k); `NOT_MEASURED` where absent.
    """

    rows: Ints
    values: Table


def gather(batches: Sequence[StepBatch], statistic: str, width: int) -> Columns:
    """The values of a statistic of consecutive batches, turned into columns."""
    parts: list[tuple[Ints, Floats]] = []
    start = 0
    for batch in batches:
        if statistic == GRAD_NORM:
            parts.append((np.arange(start, start + len(batch)), batch.grad_norm))
        elif (samples := batch.statistics.get(statistic)) is not None:
            parts.append((samples.rows + start, samples.values))
        start += len(batch)
    rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in parts)]).astype(np.int64)
    values = np.empty((width, len(rows)), np.float32)
    at = 0
    for _, block in parts:
        values[:, at : at + len(block)] = block.T
        at += len(block)
    return Columns(rows, values)


def encode_steps(batches: Sequence[StepBatch], layout: Layout, norms: Columns) -> pa.Buffer:
    """The file below `steps/`: one row per step, with the metrics and the gradient norms."""
    arrays: list[pa.Array] = [
        numbers(np.concatenate([batch.step for batch in batches])),
        strings(STAGES, np.concatenate([batch.stage for batch in batches])),
        strings(SKIP_REASONS, np.concatenate([batch.skip_reason for batch in batches])),
    ]
    names = ["step", "stage", "skip_reason"]
    for metric in layout.metrics:
        arrays.append(nullable(np.concatenate([batch.metric(metric) for batch in batches])))
        names.append(metric_column(metric))
    arrays += _float_columns(norms.values)
    names += layout.columns(GRAD_NORM)
    return encode_parquet(arrays, names, metadata=layout.metadata())


def encode_samples(steps: Ints, layout: Layout, statistics: dict[str, Columns]) -> pa.Buffer:
    """The file below `samples/`: one row per step at which a sampled statistic was taken."""
    rows = np.unique(np.concatenate([columns.rows for columns in statistics.values()]))
    arrays, names = [numbers(steps[rows])], ["step"]
    for name, columns in statistics.items():
        values = columns.values
        if len(columns.rows) != len(rows):
            values = np.full((len(columns.values), len(rows)), NOT_MEASURED, np.float32)
            values[:, np.searchsorted(rows, columns.rows)] = columns.values
        arrays += _float_columns(values)
        names += layout.columns(name)
    return encode_parquet(arrays, names, metadata=layout.metadata())


def _float_columns(values: Table) -> list[pa.Array]:
    breathe = Breather()
    columns = []
    partial = (values == NOT_MEASURED).any(axis=1) if values.size else np.zeros(len(values), bool)
    for row, is_partial in zip(values, partial.tolist(), strict=True):
        columns.append(nullable(row) if is_partial else numbers(row))
        breathe()
    return columns


def encode_parquet(arrays: list[pa.Array], names: list[str], *, metadata: dict[bytes, bytes]) -> pa.Buffer:
    """One Parquet file with one row group: zstd, byte-stream-split numbers, page checksums."""
    breathe = Breather()
    fields = []
    for name, array in zip(names, arrays, strict=True):
        fields.append(pa.field(name, array.type))
        breathe()
    schema = pa.schema(fields)
    table = pa.Table.from_arrays(arrays, schema=schema)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **PARQUET) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata(metadata)
    return sink.getvalue()


#: How every Parquet file of a run is written.
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": ["stage", "skip_reason", "statistic", "name"],
    "use_byte_stream_split": True,
    "write_statistics": ["step", "resolution", "start"],
    "write_page_checksum": True,
    "store_schema": False,
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """Metrics of n steps by name, float64 of shape (n,), and where asked for `stage` and `skip_reason` as in a batch."""

    metrics: dict[str, npt.NDArray[np.float64]]
    stage: Ints = field(default_factory=lambda: np.empty(0, np.int8))
    skip_reason: Ints = field(default_factory=lambda: np.empty(0, np.int8))


class SealedSegment:
    """A Parquet segment, opened on first use.

    Args:
        open_file: Opens a file of the run below a folder name, for pyarrow.
        steps: Its path below the run directory.
        samples: Path of the sampled statistics that belong to it; may be absent.
    """

    def __init__(self, open_file: Any, steps: str, samples: str) -> None:
        self._open_file, self._steps, self._samples = open_file, steps, samples
        self._layout: Layout | None = None
        self._step: Ints | None = None
        self._rows: int | None = None

    @property
    def layout(self) -> Layout:
        """Its columns."""
        if self._layout is None:
            self._read(self._steps, [])
        assert self._layout is not None  # noqa: S101 -- `_read` sets it or raises
        return self._layout

    @property
    def step(self) -> Ints:
        """The steps, int64 of shape (n,)."""
        if self._step is None:
            self._step = plain(self._read(self._steps, ["step"]).column("step"))
        return self._step

    @property
    def count(self) -> int:
        """How many steps, without reading them."""
        if self._rows is None:
            self._read(self._steps, [])
        return self._rows or 0

    def metrics(self, names: Sequence[str], *, words: bool = False) -> Numbers:
        """Metrics; those that the segment lacks are `NOT_MEASURED`.

        Args:
            names: Of the metrics.
            words: Read the stages and skip reasons too.
        """
        columns = {name: metric_column(name) for name in names if name in self.layout.metrics}
        wanted = [*(("stage", "skip_reason") if words else ()), *columns.values()]
        table = self._read(self._steps, wanted) if wanted else None
        found = {name: np.full(self.count, NOT_MEASURED) for name in names if name not in columns}
        if table is None:
            return Numbers(found)
        found |= {name: measured(table.column(column)) for name, column in columns.items()}
        if not words:
            return Numbers(found)
        stage, reason = (table.column(name).combine_chunks() for name in ("stage", "skip_reason"))
        return Numbers(found, codes(STAGES, stage), codes(SKIP_REASONS, reason))

    def values(self, statistic: str, names: Sequence[str]) -> Samples:
        """Rows (of the segment) at which a statistic was taken, and its values of shape (k, names)."""
        wanted = self.layout.columns(statistic, names)
        if statistic == GRAD_NORM:
            table, rows = self._read(self._steps, wanted), np.arange(self.count)
        elif statistic in self.layout.statistics:
            table = self._read(self._samples, ["step", *wanted])
            rows = np.searchsorted(self.step, plain(table.column("step")))
        else:
            return Samples(np.empty(0, np.int64), np.empty((0, len(names)), np.float32))
        values = np.empty((len(names), table.num_rows), np.float32)
        for row, column in zip(values, wanted, strict=True):
            row[:] = measured(table.column(column))
        if statistic != GRAD_NORM and len(rows):
            taken = (values != NOT_MEASURED).any(axis=0)
            rows, values = rows[taken], values[:, taken]
        return Samples(rows, values.T)

    def batch(self, parameters: tuple[Parameter, ...], statistics: Sequence[str] | None) -> StepBatch:
        """The whole segment."""
        layout = self.layout
        found = self.metrics(layout.metrics, words=True)
        chosen = [name for name in layout.statistics if statistics is None or name in statistics]
        samples = {name: self.values(name, layout.names(name)) for name in chosen}
        return StepBatch(
            parameters=parameters,
            step=self.step,
            grad_norm=self.values(GRAD_NORM, layout.parameters).values,
            metrics=found.metrics,
            statistics={name: taken for name, taken in samples.items() if len(taken.rows)},
            modules=layout.modules,
            stage=found.stage,
            skip_reason=found.skip_reason,
        )

    def _read(self, path: str, columns: list[str]) -> pa.Table:
        try:
            with self._open_file(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
                if path == self._steps and self._layout is None:
                    self._layout = Layout.from_metadata(file.metadata.metadata)
                    self._rows = file.metadata.num_rows
                return file.read(columns=columns) if columns else None
        except DAMAGE as error:
            raise RunCorruptError(f"{path} is damaged: {error}") from error

