"""Turning an ended stream into Parquet, so that a crash at any moment leaves one of the two whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from gradwatch.errors import RunCorruptError
from gradwatch.storage.columns import Columns, SegmentColumns, read_columns
from gradwatch.storage.disk import Disk
from gradwatch.storage.layout import DAMAGED_SUFFIX, OPEN_SUFFIX, ROLLUPS, SAMPLES, SEALED_SUFFIX, STEPS, Stem
from gradwatch.storage.parquet import encode_samples, encode_steps
from gradwatch.storage.rollup_files import encode_rollups, roll_up_columns
from gradwatch.storage.rollups import METRIC, Rollup


def seal(run: Path, stem: Stem, disk: Disk, *, rows: int = 0) -> int:
    """Seal one segment and remove its stream.

    The file below `steps/` is put in place last: once it is there the segment is sealed, until then the stream counts.

    Args:
        run: The run directory.
        stem: Of a stream that nobody writes to any more.
        disk: What touches the files.
        rows: How many steps it is known to hold.

    Returns:
        Bytes written.

    Raises:
        OSError: Fewer could be read, which may be for want of memory; nothing is changed.
    """
    stream, name = run / STEPS / f"{stem}{OPEN_SUFFIX}", f"{stem}{SEALED_SUFFIX}"
    if (run / STEPS / name).exists():  # sealed by a process that died before it removed the stream
        disk.remove(stream)
        return 0
    try:
        segment = read_columns(stream)
        if (found := 0 if segment is None else len(segment.step)) < rows:
            raise OSError(f"{found} of {rows} steps could be read from {stream.name}")
    except RunCorruptError as error:
        if rows:
            raise OSError(f"{stream.name} could not be read") from error
        if stream.stat().st_size:
            disk.rename(stream, stream.with_name(stream.name + DAMAGED_SUFFIX))
        else:
            disk.remove(stream)
        return 0
    if segment is None:
        disk.remove(stream)
        return 0
    written = 0
    if (samples := encode_samples(segment)) is not None:
        disk.replace(run / SAMPLES / name, samples)
        written += samples.size
    del samples
    rollups = encode_rollups(rollups_of(segment), last_step=int(segment.step[-1]))
    disk.replace(run / ROLLUPS / name, rollups)
    written += rollups.size
    del rollups
    sealed = encode_steps(segment)
    disk.replace(run / STEPS / name, sealed)
    disk.remove(stream)
    written += sealed.size
    del segment, sealed
    pa.default_memory_pool().release_unused()
    return int(written)


def seal_all(run: Path, disk: Disk) -> None:
    """Seal every stream of a run that nobody writes to."""
    for stream in sorted((run / STEPS).glob(f"*{OPEN_SUFFIX}")):
        stem = Stem.parse(stream.name.removesuffix(OPEN_SUFFIX))
        if stem is not None and not stream.is_symlink():
            seal(run, stem, disk)


def rollups_of(segment: SegmentColumns) -> list[Rollup]:
    """The rollups of all statistics and metrics of a segment, at all resolutions."""
    layout = segment.layout
    statistics = dict(segment.statistics)
    names = {name: layout.names(name) for name in statistics}
    if layout.metrics:
        statistics[METRIC] = Columns(np.arange(len(segment.step)), segment.metrics)
        names[METRIC] = layout.metrics
    return [
        rollup
        for name, columns in statistics.items()
        for rollup in roll_up_columns(name, names[name], columns, segment.step)
    ]
