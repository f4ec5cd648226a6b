"""Reading a sealed segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gradwatch.errors import RunCorruptError
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, STAGES, Ints, Parameter, Samples, StepBatch
from gradwatch.storage.arrow import plain
from gradwatch.storage.layout import GRAD_NORM, Layout, metric_column
from gradwatch.storage.stream import DAMAGE, codes, measured

#: More than any writer puts into a segment; a file that says so is damaged.
_MOST_ROWS = 1 << 27


@dataclass(frozen=True, slots=True)
class Numbers:
    """Metrics of n steps by name, float64 of shape (n,); where asked for, `stage` and `skip_reason` as in a batch."""

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

    @property
    def layout(self) -> Layout:
        """Its columns."""
        if self._layout is None:
            self._step = plain(self._read(self._steps, ["step"]).column("step"))
        assert self._layout is not None
        return self._layout

    @property
    def step(self) -> Ints:
        """The steps, int64 of shape (n,)."""
        _ = self.layout  # a file of thousands of columns is slow to open: once for both
        assert self._step is not None
        return self._step

    @property
    def count(self) -> int:
        """How many steps."""
        return len(self.step)

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
        rows: Ints
        if statistic == GRAD_NORM:
            table, rows = self._read(self._steps, wanted), np.arange(self.count)
        elif statistic in self.layout.statistics:
            table = self._read(self._samples, ["step", *wanted])
            steps = plain(table.column("step"))
            rows = np.minimum(np.searchsorted(self.step, steps), max(0, self.count - 1))
            known = self.step[rows] == steps if self.count else np.zeros(len(steps), bool)
        else:
            return Samples(np.empty(0, np.int64), np.empty((0, len(names)), np.float32))
        values = np.empty((len(names), len(rows)), np.float32)
        with damage_in(self._steps if statistic == GRAD_NORM else self._samples):
            if table.num_rows != len(rows):
                raise ValueError("rows are missing")
            for row, column in zip(values, wanted, strict=True):
                row[:] = measured(table.column(column))
        if statistic != GRAD_NORM and len(rows):
            # A retention policy may have taken the steps of some samples.
            taken = (values != NOT_MEASURED).any(axis=0) & known
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
        with (
            damage_in(path),
            self._open_file(path) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as file,
        ):
            layout = self._layout or Layout.from_metadata(file.metadata.metadata)
            if not 0 <= file.metadata.num_rows <= _MOST_ROWS:
                raise ValueError(f"{file.metadata.num_rows} rows")
            table = file.read(columns=columns, use_threads=False)
            if table.num_rows != file.metadata.num_rows or not set(columns) <= set(table.column_names):
                raise ValueError("rows or columns are missing")
            self._layout = layout
            return table


@contextmanager
def damage_in(path: str) -> Iterator[None]:
    """Errors of a damaged file come out as RunCorruptError."""
    try:
        yield
    except DAMAGE as error:
        raise RunCorruptError(f"{path} is damaged: {error}") from error
