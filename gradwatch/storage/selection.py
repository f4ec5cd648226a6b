"""Picking steps, layers and values out of a catalog."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.errors import ConfigurationError, RunError, UnknownNameError
from gradwatch.records import NOT_MEASURED, Ints
from gradwatch.storage.catalog import Catalog, Segment, within
from gradwatch.storage.files import Files
from gradwatch.storage.layout import ROLLUPS, SEALED_SUFFIX, Stem
from gradwatch.storage.rollup_files import decode_rollup, roll_up_in_blocks
from gradwatch.storage.rollups import METRIC, Rollup, combine, empty
from gradwatch.storage.segments import Numbers

Patterns = str | Sequence[str] | None


def matching(kind: str, names: Iterable[str], patterns: Patterns) -> set[str]:
    """The names that one of the patterns matches; all when there are none.

    Raises:
        UnknownNameError: When a pattern matches nothing.
    """
    known = set(names)
    if patterns is None:
        return known
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {pattern} & known or {name for name in known if fnmatchcase(name, pattern)}
        if not hits:
            raise UnknownNameError.among(kind, pattern, known)
        found |= hits
    return found


def check_steps(steps: slice | None) -> slice | None:
    """Raise ConfigurationError when `steps` is no plain range of step numbers."""
    if steps is None or (isinstance(steps, slice) and steps.step in (None, 1)):
        return steps
    raise ConfigurationError.of("steps", "a slice of step numbers without a stride, such as slice(0, 1000)", steps)


def chosen(catalog: Catalog, steps: slice | None) -> list[tuple[Stem, Segment, slice]]:
    """The segments with rows in `steps`, and these rows; segments out of range are not opened."""
    found = []
    for stem, segment, rows in catalog.readable(steps):
        part = within(segment.step[rows], steps)
        if part.stop > part.start:
            found.append((stem, segment, part))
    return found


def read_values(
    catalog: Catalog, statistic: str, names: Sequence[str], steps: slice | None
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Steps at which a statistic was taken, and its values of shape (k, names); `NOT_MEASURED` where absent."""
    taken: list[Ints] = [np.empty(0, np.int64)]
    blocks: list[tuple[list[int], npt.NDArray[Any]]] = []
    for stem, segment, rows in chosen(catalog, steps):
        there = set(segment.layout.names(statistic))
        present = [i for i, name in enumerate(names) if name in there]
        try:
            samples = segment.values(statistic, [names[i] for i in present])
        except RunError as error:
            catalog.note(stem, error)
            continue
        low, high = np.searchsorted(samples.rows, (rows.start, rows.stop))
        taken.append(segment.step[samples.rows[low:high]])
        blocks.append((present, samples.values[low:high]))
    values = np.full((sum(map(len, taken)), len(names)), NOT_MEASURED, np.float32)
    at = 0
    for present, block in blocks:
        if len(present) == len(names):
            values[at : at + len(block)] = block
        else:
            values[at : at + len(block), present] = block
        at += len(block)
    return np.concatenate(taken), values


def read_metrics(catalog: Catalog, names: Sequence[str], steps: slice | None) -> tuple[Ints, Numbers]:
    """All steps, and the named metrics, stages and skip reasons at them."""
    taken: list[Ints] = [np.empty(0, np.int64)]
    parts: list[tuple[Numbers, slice]] = []
    for stem, segment, rows in chosen(catalog, steps):
        try:
            parts.append((segment.metrics(names, words=True), rows))
        except RunError as error:
            catalog.note(stem, error)
            continue
        taken.append(segment.step[rows])
    nothing = np.empty(0, np.int8)
    metrics = {
        name: np.concatenate([np.empty(0), *(part.metrics[name][rows] for part, rows in parts)]) for name in names
    }
    stage = np.concatenate([nothing, *(part.stage[rows] for part, rows in parts)])
    reason = np.concatenate([nothing, *(part.skip_reason[rows] for part, rows in parts)])
    return np.concatenate(taken), Numbers(metrics, stage, reason)


def read_rollup(
    files: Files, catalog: Catalog, names: Sequence[str], steps: slice | None, *, statistic: str, resolution: int
) -> Rollup:
    """A statistic in bins; from the rollups where a segment has them and all its steps count, else from its steps."""
    parts = []
    for stem in catalog.stems_in(steps):
        part = None
        if catalog.is_sealed(stem):
            part = _stored(files, catalog, stem, statistic=statistic, resolution=resolution)
        if part is None and (found := catalog.counted(stem)) is not None:
            try:
                part = _computed(*found, names, statistic=statistic, resolution=resolution)
            except RunError as error:
                catalog.note(stem, error)
        parts += [] if part is None else [part]
    rollup = combine(parts, names, statistic=statistic, resolution=resolution)
    return rollup if steps is None else _clipped(rollup, steps)


def _stored(files: Files, catalog: Catalog, stem: Stem, *, statistic: str, resolution: int) -> Rollup | None:
    path = f"{ROLLUPS}/{stem}{SEALED_SUFFIX}"
    try:
        with files.open(path) as source:
            return decode_rollup(source, path, statistic=statistic, resolution=resolution, limit=catalog.limit(stem))
    except FileNotFoundError:
        return None
    except RunError as error:
        catalog.damage[path] = str(error)
        return None


def _computed(segment: Segment, rows: slice, names: Sequence[str], *, statistic: str, resolution: int) -> Rollup:
    there = set(segment.layout.metrics if statistic == METRIC else segment.layout.names(statistic))
    known = [name for name in names if name in there]
    if not known:
        return empty(statistic, resolution, names)
    if statistic == METRIC:
        found = segment.metrics(known).metrics
        step = segment.step[rows]
        values: npt.NDArray[Any] = np.stack([found[name][rows] for name in known])
    else:
        samples = segment.values(statistic, known)
        low, high = np.searchsorted(samples.rows, (rows.start, rows.stop))
        step, values = segment.step[samples.rows[low:high]], samples.values[low:high].T
    if not len(step):
        return empty(statistic, resolution, names)
    return roll_up_in_blocks(values, step, [resolution], statistic=statistic, names=known)[0]


def _clipped(rollup: Rollup, steps: slice) -> Rollup:
    """The bins that touch `steps`."""
    first = 0 if steps.start is None else steps.start - steps.start % rollup.resolution
    low = int(np.searchsorted(rollup.start, first))
    high = len(rollup) if steps.stop is None else int(np.searchsorted(rollup.start, steps.stop))
    return rollup.bins(low, high)
