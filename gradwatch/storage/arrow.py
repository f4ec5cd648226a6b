"""Arrow arrays from numpy and back without `pa.array` and `to_numpy`, which import pandas.

That import takes half a second of the training's interpreter, and fails when it happens while the interpreter exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gradwatch.records import Ints


def numbers(values: npt.NDArray[Any], absent: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """A column of numbers; null where `absent`."""
    data = np.ascontiguousarray(values)
    validity = None if absent is None else _bits(~absent)
    return pa.Array.from_buffers(pa.from_numpy_dtype(data.dtype), len(data), [validity, pa.py_buffer(data)])


def booleans(values: npt.NDArray[np.bool_]) -> pa.Array:
    """A column of truth values."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])


def text(words: Sequence[str]) -> pa.Array:
    """A column of strings."""
    encoded = [word.encode() for word in words]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    data = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), data)


def strings(table: Sequence[str], codes: Ints) -> pa.Array:
    """A column of strings from indices into a table."""
    return text(table).take(numbers(np.asarray(codes, np.int64)))


def _bits(values: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def plain(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """The numbers of a column as a copy; what stands in the place of a null is arbitrary."""
    if isinstance(column, pa.ChunkedArray):
        parts = [plain(chunk) for chunk in column.chunks]
        return np.concatenate(parts) if parts else np.empty(0, column.type.to_pandas_dtype())
    if pa.types.is_boolean(column.type):
        return _unpacked(column.buffers()[1], column)
    data = np.frombuffer(column.buffers()[1] or b"", column.type.to_pandas_dtype())
    return data[column.offset : column.offset + len(column)].copy()


def absent(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Where a column is null."""
    if isinstance(column, pa.ChunkedArray):
        parts = [absent(chunk) for chunk in column.chunks]
        return np.concatenate(parts) if parts else np.empty(0, np.bool_)
    if not column.null_count:
        return np.zeros(len(column), np.bool_)
    return ~_unpacked(column.buffers()[0], column)


def _unpacked(bits: pa.Buffer, column: pa.Array) -> npt.NDArray[np.bool_]:
    unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    return unpacked[column.offset : column.offset + len(column)].astype(np.bool_)
