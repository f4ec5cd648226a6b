"""Turning an ended stream into Parquet, so that a crash at any moment leaves one of the two whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from gradwatch.records import Ints, Parameter, StepBatch
from gradwatch.storage.disk import Disk
from gradwatch.storage.layout import GRAD_NORM, OPEN_SUFFIX, ROLLUPS, SAMPLES, SEALED_SUFFIX, STEPS, Layout, Stem
from gradwatch.storage.rollup_files import encode_rollups, roll_up_columns
from gradwatch.storage.rollups import METRIC, Rollup
from gradwatch.storage.segments import Columns, encode_samples, encode_steps, gather
from gradwatch.storage.stream import StreamDecoder


def seal(run: Path, stem: Stem, disk: Disk) -> int:
    """Seal one segment and remove its stream.

    The file below `steps/` is put in place last: once it is there the segment is sealed, until then the stream counts.

    Args:
        run: The run directory.
        stem: Of a stream that nobody writes to any more.
        disk: What touches the files.

    Returns:
        Bytes written.
    """
    stream, name = run / STEPS / f"{stem}{OPEN_SUFFIX}", f"{stem}{SEALED_SUFFIX}"
    data = stream.read_bytes()
    decoder = StreamDecoder(data)
    layout = decoder.layout
    batches = list(decoder.decode(data[decoder.offset :], tuple(map(Parameter, layout.parameters))))
    del data
    if not batches:
        disk.remove(stream)
        return 0
    written = 0
    norms = gather(batches, GRAD_NORM, len(layout.parameters))
    statistics = {s: gather(batches, s, len(layout.names(s))) for s in layout.statistics}
    statistics = {s: columns for s, columns in statistics.items() if len(columns.rows)}
    steps = np.concatenate([batch.step for batch in batches])
    if statistics:
        samples = encode_samples(steps, layout, statistics)
        disk.replace(run / SAMPLES / name, samples, sync=True)
        written += samples.size
    rollups = _roll_up(batches, layout, steps, {GRAD_NORM: norms, **statistics})
    disk.replace(run / ROLLUPS / name, rollups, sync=False)
    written += rollups.size
    sealed = encode_steps(batches, layout, norms)
    disk.replace(run / STEPS / name, sealed, sync=True)
    disk.remove(stream)
    return written + sealed.size


def _roll_up(batches: list[StepBatch], layout: Layout, steps: Ints, statistics: dict[str, Columns]) -> pa.Buffer:
    rollups: list[Rollup] = []
    for name, columns in statistics.items():
        rollups += roll_up_columns(name, layout.names(name), columns, steps)
    if layout.metrics:
        metrics = np.stack([np.concatenate([batch.metric(name) for batch in batches]) for name in layout.metrics])
        rollups += roll_up_columns(METRIC, layout.metrics, Columns(np.arange(len(steps)), metrics), steps)
    return encode_rollups(rollups)
