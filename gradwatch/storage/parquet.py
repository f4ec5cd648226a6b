"""Encoding a sealed segment: Parquet, one float32 column per parameter and statistic."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gradwatch.records import SKIP_REASONS, STAGES
from gradwatch.storage.arrow import numbers, strings
from gradwatch.storage.columns import SegmentColumns, take_rows
from gradwatch.storage.layout import GRAD_NORM, metric_column
from gradwatch.storage.pace import Breather
from gradwatch.storage.stream import nullable

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


def encode_steps(segment: SegmentColumns) -> pa.Buffer:
    """The file below `steps/`: one row per step, with the metrics and the gradient norms."""
    layout = segment.layout
    arrays = [numbers(segment.step), strings(STAGES, segment.stage), strings(SKIP_REASONS, segment.skip_reason)]
    arrays += [nullable(values) for values in segment.metrics]
    arrays += _float_columns(segment.statistics[GRAD_NORM].values)
    names = ["step", "stage", "skip_reason", *map(metric_column, layout.metrics), *layout.columns(GRAD_NORM)]
    return encode_parquet(arrays, names, metadata=layout.metadata())


def encode_samples(segment: SegmentColumns) -> pa.Buffer | None:
    """The file below `samples/`: one row per step at which a sampled statistic was taken; None when none was."""
    sampled = {name: columns for name, columns in segment.statistics.items() if name != GRAD_NORM}
    if not sampled:
        return None
    taken = np.zeros(len(segment.step), bool)
    for columns in sampled.values():
        taken[columns.rows] = True
    rows = np.flatnonzero(taken)
    arrays, names = [numbers(segment.step[rows])], ["step"]
    for name, columns in sampled.items():
        arrays += _float_columns(take_rows(columns, rows))
        names += segment.layout.columns(name)
    return encode_parquet(arrays, names, metadata=segment.layout.metadata())


def _float_columns(values: npt.NDArray[np.float32]) -> list[pa.Array]:
    breathe = Breather()
    columns = []
    for row in values:
        columns.append(nullable(row))
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
    breathe()
    table = pa.Table.from_arrays(arrays, schema=schema)
    breathe()
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **PARQUET) as writer:
        breathe()
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata(metadata)
    return sink.getvalue()
