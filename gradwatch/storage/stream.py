"""The open segment: an Arrow IPC stream that grows by a record batch per flush, each with a checksum.

A statistic is one list column here (all names in a row), so that a flush costs the same for ten parameters and for ten
thousand; sealing turns the lists into columns.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradwatch.errors import RunCorruptError, RunFormatError
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, STAGES, Floats, Ints, Parameter, Samples, StepBatch
from gradwatch.storage.arrow import absent, booleans, numbers, plain, strings, text
from gradwatch.storage.layout import GRAD_NORM, Layout, metric_column

CHECKSUM = "crc32"
#: What damaged bytes may raise on the way through Arrow.
DAMAGE = (
    pa.ArrowException,
    MemoryError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    OverflowError,
    EOFError,
    StopIteration,
)


def schema_of(layout: Layout) -> pa.Schema:
    """Schema of the open segment."""
    fields = [pa.field("step", pa.int64()), pa.field("stage", pa.string()), pa.field("skip_reason", pa.string())]
    fields += [pa.field(metric_column(name), pa.float64()) for name in layout.metrics]
    fields += [pa.field(name, pa.list_(pa.float32())) for name in (GRAD_NORM, *layout.statistics)]
    return pa.schema(fields, metadata=layout.metadata())


class StreamEncoder:
    """Turns batches into the bytes that are to be appended to the file.

    Args:
        layout: Of the segment.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._schema = schema_of(layout)
        self._parts: list[bytes] = []
        self._stream = pa.ipc.new_stream(_Collector(self._parts.append), self._schema)
        #: The first bytes of the file; the stream itself writes them together with the first record batch.
        self.head = self._schema.serialize().to_pybytes()

    def encode(self, batch: StepBatch) -> bytes:
        """The bytes of one record batch."""
        rows = encode_rows(batch, self.layout, self._schema)
        try:
            self._stream.write_batch(rows, custom_metadata={CHECKSUM: str(checksum(rows))})
            return b"".join(self._parts).removeprefix(self.head)
        finally:
            self._parts.clear()  # also of what was not whole


class _Collector(io.RawIOBase):
    """A file that hands what is written to a function."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._take(bytes(data))
        return len(data)


def encode_rows(batch: StepBatch, layout: Layout, schema: pa.Schema) -> pa.RecordBatch:
    """The batch as Arrow columns; `NOT_MEASURED` becomes null."""
    columns = [
        numbers(np.asarray(batch.step, np.int64)),
        strings(STAGES, batch.stage),
        strings(SKIP_REASONS, batch.skip_reason),
    ]
    columns += [nullable(np.asarray(batch.metric(name), np.float64)) for name in layout.metrics]
    columns.append(_lists(np.arange(len(batch)), batch.grad_norm, len(batch)))
    for name in layout.statistics:
        samples = batch.statistics.get(name)
        if samples is None:
            columns.append(pa.nulls(len(batch), pa.list_(pa.float32())))
        else:
            columns.append(_lists(samples.rows, samples.values, len(batch)))
    return pa.record_batch(columns, schema=schema)


def codes(table: tuple[str, ...], words: pa.Array | pa.ChunkedArray) -> Ints:
    """Indices into a table from strings; a word of a later version reads as the first."""
    found = pc.index_in(words, text(table))
    return np.where(absent(found), 0, plain(found)).astype(np.int8)


def nullable(values: Floats) -> pa.Array:
    """A float column; `NOT_MEASURED` becomes null, NaN stays NaN."""
    missing = values == NOT_MEASURED
    return numbers(values, missing if missing.any() else None)


def measured(column: pa.Array | pa.ChunkedArray) -> Floats:
    """The inverse of `nullable`, a copy that can be written to."""
    values: Floats = plain(column)
    if column.null_count:
        values[absent(column)] = NOT_MEASURED
    return values


def _lists(rows: Ints, values: Floats, n: int) -> pa.Array:
    """A list column of n rows that holds `values[i]` in `rows[i]` and null elsewhere."""
    width = values.shape[1]
    present = np.zeros(n, bool)
    present[rows] = True
    offsets = numbers(np.concatenate([[0], np.cumsum(present * width)]).astype(np.int32))
    child = nullable(np.ascontiguousarray(values, np.float32).reshape(-1))
    if present.all():
        return pa.ListArray.from_arrays(offsets, child)
    return pa.ListArray.from_arrays(offsets, child, mask=booleans(~present))


def checksum(rows: pa.RecordBatch) -> int:
    """CRC-32 over the buffers of all columns, in order; a bitmap that says "all valid" does not count.

    Nor does a column without a value: Arrow writes nothing of its offsets, so they are not what they were in memory.
    """
    value = 0
    for column in rows.columns:
        if column.null_count == len(column):
            continue
        buffers = column.buffers()
        for buffer in buffers if column.null_count else buffers[1:]:
            if buffer is not None:
                value = zlib.crc32(buffer, value)
    return value


def read_layout(source: pa.NativeFile) -> Layout:
    """The layout that a stream begins with.

    Raises:
        RunCorruptError: When the schema is torn or damaged.
        RunFormatError: When it is not one of ours.
    """
    try:
        schema = pa.ipc.open_stream(source).schema
    except DAMAGE as error:
        raise RunCorruptError("the segment does not begin with a schema") from error
    layout = Layout.from_metadata(schema.metadata)
    if not schema.equals(schema_of(layout)):
        raise RunFormatError("the segment has other columns than it says")
    return layout


def record_batches(source: pa.NativeFile, layout: Layout) -> Iterator[pa.RecordBatch]:
    """The record batches of a stream, up to the first that is torn or damaged; read one by one."""
    try:
        stream = pa.ipc.open_stream(source)
        while True:
            rows, metadata = stream.read_next_batch_with_custom_metadata()
            rows.validate(full=True)
            if metadata is None or int(metadata[CHECKSUM]) != checksum(rows) or not _fits(rows, layout):
                return
            yield rows
    except DAMAGE:
        return


def _fits(rows: pa.RecordBatch, layout: Layout) -> bool:
    """Whether every list holds one value per name, and a statistic that every step has is in every row."""
    for name in (GRAD_NORM, *layout.statistics):
        column = rows.column(name)
        present = rows.num_rows - column.null_count
        if len(column.flatten()) != present * len(layout.names(name)) or (name == GRAD_NORM and column.null_count):
            return False
    return not rows.column("step").null_count


class StreamDecoder:
    """Reads an open segment that may still grow, may be torn, may be damaged.

    Args:
        head: The first bytes of the file, at least its schema.

    Raises:
        RunCorruptError: When the schema is torn or damaged.
        RunFormatError: When it is not one of ours.
    """

    def __init__(self, head: bytes) -> None:
        source = pa.BufferReader(pa.py_buffer(head))
        self.layout = read_layout(source)
        #: How many bytes of the file have been read.
        self.offset = source.tell()
        self._head = head[: self.offset]

    def decode(self, tail: bytes, parameters: tuple[Parameter, ...]) -> Iterator[StepBatch]:
        """The whole record batches of the file from `offset` on, up to the first that is torn or damaged."""
        source = pa.BufferReader(pa.py_buffer(self._head + tail))
        begin = self.offset - len(self._head)
        for rows in record_batches(source, self.layout):
            yield decode_rows(rows, self.layout, parameters)
            self.offset = begin + source.tell()


def decode_rows(rows: pa.RecordBatch, layout: Layout, parameters: tuple[Parameter, ...]) -> StepBatch:
    """The inverse of `encode_rows`."""
    samples = {name: list_values(rows.column(name), len(layout.names(name))) for name in layout.statistics}
    return StepBatch(
        parameters=parameters,
        step=plain(rows.column("step")),
        grad_norm=list_values(rows.column(GRAD_NORM), len(layout.parameters)).values,
        metrics={name: measured(rows.column(metric_column(name))) for name in layout.metrics},
        statistics={name: found for name, found in samples.items() if len(found.rows)},
        modules=layout.modules,
        stage=codes(STAGES, rows.column("stage")),
        skip_reason=codes(SKIP_REASONS, rows.column("skip_reason")),
    )


def list_values(column: pa.ListArray, width: int) -> Samples:
    """The rows that are not null, and their lists of `width` values each."""
    present = np.flatnonzero(~absent(column))
    return Samples(rows=present, values=measured(column.flatten()).reshape(len(present), width))
