"""The file of a segment's rollups: one row group per resolution, rows in the order statistic, name, bin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gradwatch.errors import RunCorruptError
from gradwatch.records import FORMAT_VERSION, Ints
from gradwatch.storage.arrow import absent, numbers, plain, text
from gradwatch.storage.columns import Columns
from gradwatch.storage.layout import METADATA_KEY
from gradwatch.storage.memory import room
from gradwatch.storage.pace import Breather
from gradwatch.storage.parquet import PARQUET
from gradwatch.storage.rollups import LEAST_SAMPLES, Array, Rollup, coarser, roll_up
from gradwatch.storage.stream import DAMAGE

#: How many values are rolled up at a time.
_BLOCK = 1 << 15
#: Mantissa bits that are kept of a mean: a relative error of 1.2e-4, for a quarter of the bytes.
_MEAN_BITS = 12
_FLOATS = ("minimum", "maximum", "mean")
_COUNTS = ("count", "nonfinite")
_WORD = pa.dictionary(pa.int32(), pa.string())
_SCHEMA = pa.schema(
    [("resolution", pa.int64()), ("statistic", _WORD), ("name", _WORD), ("start", pa.int64())]
    + [(name, pa.int64()) for name in _COUNTS]
    + [(name, pa.float64()) for name in _FLOATS]
)


def roll_up_columns(statistic: str, names: Sequence[str], columns: Columns, steps: Ints) -> list[Rollup]:
    """All resolutions of one statistic of a segment, the finest first.

    The finest is the first whose bins hold enough samples: finer ones would weigh more than the record itself.
    """
    taken = steps[columns.rows]
    if not len(taken) or not len(names):
        return []
    resolution = 10
    while (bins := len(_starts(taken, resolution))) > 1 and len(taken) < LEAST_SAMPLES * bins:
        resolution *= 10
    resolutions = [resolution]
    while len(_starts(taken, resolutions[-1])) > 1:
        resolutions.append(resolutions[-1] * 10)
    return roll_up_in_blocks(columns.values, taken, resolutions, statistic=statistic, names=names)


def roll_up_in_blocks(
    columns: npt.NDArray[Any], steps: Ints, resolutions: Sequence[int], *, statistic: str, names: Sequence[str]
) -> list[Rollup]:
    """As `roll_up`, for columns of shape (c, k), in little memory and letting the interpreter go now and then.

    Each resolution is a multiple of the one before.
    """
    breathe = Breather()
    width = max(1, _BLOCK // max(1, len(steps)))
    found = [_blank(statistic, resolution, names, _starts(steps, resolution)) for resolution in resolutions]
    for low in range(0, len(names), width):
        block = slice(low, low + width)
        part = roll_up(columns[block].T, steps, resolutions[0], statistic=statistic, names=names[block])
        for rollup in found:
            part = coarser(part, rollup.resolution)
            for field in (*_COUNTS, *_FLOATS):
                getattr(rollup, field)[:, block] = getattr(part, field)
            breathe()
    return found


def _starts(steps: Ints, resolution: int) -> Ints:
    """The first step of each bin that has one of the ascending steps."""
    bins = steps // resolution
    return bins[np.flatnonzero(np.diff(bins, prepend=-1))] * resolution


def _blank(statistic: str, resolution: int, names: Sequence[str], starts: Ints) -> Rollup:
    """A rollup to be filled in, whose columns are contiguous, as they are written."""
    counts = {field: room(np.int64, len(names), len(starts)).T for field in _COUNTS}
    floats = {field: room(np.float64, len(names), len(starts)).T for field in _FLOATS}
    return Rollup(statistic, resolution, tuple(names), starts, **counts, **floats)


def encode_rollups(rollups: Sequence[Rollup], *, last_step: int) -> pa.Buffer:
    """The file, from rollups of any statistics and resolutions; `last_step` is the last that they cover."""
    breathe = Breather()
    sink = pa.BufferOutputStream()
    resolutions = sorted({rollup.resolution for rollup in rollups})
    with pq.ParquetWriter(sink, _SCHEMA, **PARQUET) as writer:
        for resolution in resolutions:
            tables = []
            for rollup in rollups:
                if rollup.resolution == resolution:
                    tables.append(_table(rollup))
                    breathe()
            table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
            writer.write_table(table, row_group_size=table.num_rows)
        facts = {"format_version": FORMAT_VERSION, "last_step": last_step, "resolutions": resolutions}
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(facts)})
    return sink.getvalue()


def _table(rollup: Rollup) -> pa.Table:
    shape = len(rollup.names), len(rollup)
    rows = shape[0] * shape[1]
    name, start = room(np.int32, *shape), room(np.int64, *shape)
    name[:], start[:] = np.arange(shape[0])[:, None], rollup.start
    resolution = room(np.int64, rows)
    resolution[:] = rollup.resolution
    arrays = [
        numbers(resolution),
        pa.DictionaryArray.from_arrays(numbers(room(np.int32, rows)), text([rollup.statistic])),
        pa.DictionaryArray.from_arrays(numbers(name.ravel()), text(rollup.names)),
        numbers(start.ravel()),
        *(numbers(getattr(rollup, field).T.ravel()) for field in _COUNTS),
        *(_floats(_rounded(rollup.mean) if field == "mean" else getattr(rollup, field)) for field in _FLOATS),
    ]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def _floats(values: Array) -> pa.Array:
    flat = values.T.ravel()
    return numbers(flat, np.isnan(flat))


def _floats_back(column: pa.ChunkedArray) -> Array:
    return np.where(absent(column), np.nan, plain(column))


def _rounded(values: Array) -> Array:
    """To `_MEAN_BITS` bits of mantissa, which zstd makes use of."""
    found: Array
    found, exponent = room(np.float64, *values.T.shape).T, room(np.int32, *values.T.shape).T
    np.frexp(values, out=(found, exponent))
    found *= 1 << _MEAN_BITS
    np.rint(found, out=found)
    found /= 1 << _MEAN_BITS
    np.ldexp(found, exponent, out=found)
    return found


def decode_rollup(
    source: Any, where: str, *, statistic: str, resolution: int, limit: int | None = None
) -> Rollup | None:
    """The statistic at the coarsest resolution in the file that divides `resolution`; None when there is none.

    Args:
        source: The file.
        where: Its name, for errors.
        statistic: Of which.
        resolution: In steps.
        limit: The step from which on a later segment answers: None is returned when the file covers any such step.

    Raises:
        RunCorruptError: When the file is damaged.
    """
    try:
        with pq.ParquetFile(source, page_checksum_verification=True, read_dictionary=["statistic", "name"]) as file:
            facts = json.loads(file.metadata.metadata[METADATA_KEY])
            if limit is not None and int(facts["last_step"]) >= limit:
                return None
            groups = _row_groups(file, facts)
            for found in sorted((r for r in groups if resolution % r == 0), reverse=True):
                rollup = _select(file.read_row_group(groups[found]), statistic, found)
                if rollup is not None:
                    return coarser(rollup, resolution)
            return None
    except DAMAGE as error:
        raise RunCorruptError(f"{where} is damaged: {error}") from error


def _row_groups(file: pq.ParquetFile, facts: Mapping[str, Any]) -> Mapping[int, int]:
    """Resolution to the place of its row group.

    Not from the statistics in the footer: where that is damaged, asking pyarrow for them ends the process.
    """
    resolutions = [int(resolution) for resolution in facts["resolutions"]]
    if len(resolutions) != file.num_row_groups or min(resolutions, default=1) < 1:
        raise ValueError("other row groups than it says")
    return {resolution: i for i, resolution in enumerate(resolutions)}


def _select(table: pa.Table, statistic: str, resolution: int) -> Rollup | None:
    """The rows of one statistic, as a grid of bins and names."""
    words = table.column("statistic").combine_chunks()
    known = words.dictionary.to_pylist()
    if statistic not in known:
        return None
    rows = np.flatnonzero(plain(words.indices) == known.index(statistic))
    if not len(rows):
        return None
    table = table.slice(rows[0], rows[-1] + 1 - rows[0])
    names = table.column("name").combine_chunks()
    codes = plain(names.indices)
    edges = np.flatnonzero(np.diff(codes)) + 1
    columns, bins = len(edges) + 1, len(rows) // (len(edges) + 1)
    order = codes[::bins][:columns]
    if bins * columns != table.num_rows or len(rows) != table.num_rows:
        raise ValueError("the rows are no grid")
    labels = names.dictionary.to_pylist()
    grids = {name: plain(table.column(name)).reshape(columns, bins).T for name in _COUNTS}
    grids |= {name: _floats_back(table.column(name)).reshape(columns, bins).T for name in _FLOATS}
    start = plain(table.column("start"))[:bins]
    return Rollup(statistic, resolution, tuple(labels[code] for code in order), start, **grids)
