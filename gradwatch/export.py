"""Taking a run elsewhere: one CSV, Parquet or JSON-lines file, or TensorBoard event files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.errors import ConfigurationError, MissingDependencyError, RunExistsError, UnknownNameError
from gradwatch.reader import RunReader
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, STAGES, StepBatch
from gradwatch.storage.layout import GRAD_NORM, metric_column

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("csv", "parquet", "jsonl", "tensorboard")
_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
#: Steps that are held in memory at a time.
_PIECE = 2000


def export_run(
    run: RunReader | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 -- the word that everybody uses
    overwrite: bool = False,
) -> Path:
    """Write all steps of a run, one row each, with the columns of the record: `step`, metrics, `grad_norm/NAME`, ...

    The run is read in pieces, so that memory does not grow with its length.

    Args:
        run: An open run, or its path.
        path: The file to write; for TensorBoard a directory.
        format: `csv`, `parquet`, `jsonl` or `tensorboard`; by default what the suffix of `path` says.
        overwrite: Replace a file that is there.

    Returns:
        The path.

    Raises:
        UnknownNameError: For an unknown format.
        ConfigurationError: When neither the format nor the suffix tells it.
        RunExistsError: When the file is there already.
        MissingDependencyError: When TensorBoard is not installed.
    """
    target = Path(path)
    kind = format or _SUFFIXES.get(target.suffix)
    if kind is None:
        raise ConfigurationError.of("format", f"given, or the suffix one of {', '.join(_SUFFIXES)}", target.suffix)
    if kind not in FORMATS:
        raise UnknownNameError.among("format", kind, FORMATS)
    if target.exists() and not overwrite and kind != "tensorboard":
        raise RunExistsError(f"{target} is there already: say overwrite=True, or choose another name")
    reader = run if isinstance(run, RunReader) else RunReader(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    {"csv": _to_csv, "parquet": _to_parquet, "jsonl": _to_jsonl, "tensorboard": _to_tensorboard}[kind](reader, target)
    return target


def to_frame(run: RunReader, *, steps: slice | None = None) -> pd.DataFrame:
    """All steps as one table: index `step`; `stage`, `skip_reason`, metrics, and a column per statistic and name."""
    import pandas as pd

    pieces = [_frame(batch, run) for batch in run.batches(_PIECE, steps=steps)]
    return pd.concat(pieces) if pieces else pd.DataFrame(columns=pd.Index(_columns(run)))


def _columns(run: RunReader) -> list[str]:
    names = ["stage", "skip_reason", *map(metric_column, run.metric_names)]
    for statistic in run.statistic_names:
        names += [f"{statistic}/{name}" for name in run.names(statistic)]
    return names


def _frame(batch: StepBatch, run: RunReader) -> pd.DataFrame:
    """The batch with all columns of the run; NaN where nothing was measured."""
    import pandas as pd

    columns: dict[str, Any] = {
        "stage": np.array(STAGES)[batch.stage],
        "skip_reason": np.array(SKIP_REASONS)[batch.skip_reason],
    }
    columns |= {metric_column(name): _shown(batch.metric(name)) for name in batch.metrics}
    columns |= {f"{GRAD_NORM}/{p.name}": _shown(v) for p, v in zip(batch.parameters, batch.grad_norm.T, strict=True)}
    for statistic, samples in batch.statistics.items():
        dense = np.full((len(batch), samples.values.shape[1]), np.nan, np.float32)
        dense[samples.rows] = _shown(samples.values)
        is_of_modules = samples.values.shape[1] == len(batch.modules) != len(batch.parameters)
        names = batch.modules if is_of_modules else tuple(p.name for p in batch.parameters)
        columns |= {f"{statistic}/{name}": values for name, values in zip(names, dense.T, strict=True)}
    return pd.DataFrame(columns, index=pd.Index(batch.step, name="step")).reindex(columns=_columns(run))


def _shown(values: Any) -> Any:
    return np.where(values == NOT_MEASURED, values.dtype.type(np.nan), values)


def _frames(run: RunReader) -> Iterator[pd.DataFrame]:
    yield from (_frame(batch, run) for batch in run.batches(_PIECE))


def _to_csv(run: RunReader, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(_csv_head(run))
        for frame in _frames(run):
            frame.to_csv(file, header=False)


def _csv_head(run: RunReader) -> str:
    import pandas as pd

    head: str = pd.DataFrame(columns=pd.Index(_columns(run)), index=pd.Index([], name="step")).to_csv()
    return head


def _to_jsonl(run: RunReader, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for frame in _frames(run):
            frame.reset_index().to_json(file, orient="records", lines=True, double_precision=15)


def _to_parquet(run: RunReader, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    try:
        for frame in _frames(run):
            if writer is None:
                schema = pa.Schema.from_pandas(frame.reset_index(), preserve_index=False).remove_metadata()
                writer = pq.ParquetWriter(path, schema, compression="zstd")
            writer.write_table(pa.Table.from_pandas(frame.reset_index(), schema=schema, preserve_index=False))
        if writer is None:
            pq.write_table(pa.table({"step": pa.array([], pa.int64())}), path)
    finally:
        if writer is not None:
            writer.close()


def _to_tensorboard(run: RunReader, path: Path) -> None:
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise MissingDependencyError.of("tensorboard", extra="tensorboard") from error
    writer = EventFileWriter(str(path))
    try:
        for frame in _frames(run):
            times = frame["time"].to_numpy(float, na_value=run.info.started)
            numbers = frame.drop(columns=["stage", "skip_reason", "time"])
            for step, time, row in zip(frame.index, times, numbers.to_numpy(float, na_value=np.nan), strict=True):
                values = [
                    Summary.Value(tag=n, simple_value=v) for n, v in zip(numbers, row, strict=True) if not math.isnan(v)
                ]
                writer.add_event(Event(wall_time=time, step=int(step), summary=Summary(value=values)))
    finally:
        writer.close()
