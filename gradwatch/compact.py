"""Making old runs smaller: full resolution only where it matters, rollups for the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradwatch.errors import ConfigurationError, RunNotFoundError
from gradwatch.reader import RunReader
from gradwatch.records import Ints, Parameter
from gradwatch.storage.batches import select
from gradwatch.storage.catalog import Catalog, Segment
from gradwatch.storage.claiming import make_folders
from gradwatch.storage.columns import columns_of
from gradwatch.storage.disk import Disk
from gradwatch.storage.files import LocalFiles
from gradwatch.storage.layout import LOCK_FILE, ROLLUPS, SAMPLES, SEALED_SUFFIX, STEPS, Stem
from gradwatch.storage.lock import Lock
from gradwatch.storage.parquet import encode_samples, encode_steps
from gradwatch.storage.rollup_files import encode_rollups
from gradwatch.storage.sealing import rollups_of, seal_all


@dataclass(frozen=True, slots=True)
class Keep:
    """Which steps keep their full resolution; of the others the rollups remain.

    Args:
        last: The last so many steps.
        around: So many steps before and after each finding and each action.
        first: The first so many steps, where most runs go wrong.

    Raises:
        ConfigurationError: When a number is negative.
    """

    last: int
    around: int = 500
    first: int = 1000

    def __post_init__(self) -> None:
        for name in ("last", "around", "first"):
            if getattr(self, name) < 0:
                raise ConfigurationError.of(name, ">= 0", getattr(self, name))

    def rows(self, steps: Ints, *, end: int, events: Sequence[int]) -> Ints:
        """Which of ascending `steps` are kept.

        Args:
            steps: Shape (n,).
            end: The step after the last of the run.
            events: Steps of findings and actions, ascending.
        """
        kept = (steps >= end - self.last) | (steps < self.first)
        if len(events):
            after = np.searchsorted(np.asarray(events), steps)
            padded = np.array([-(1 << 62), *events, 1 << 62])
            kept |= np.minimum(steps - padded[after], padded[after + 1] - steps) <= self.around
        return np.flatnonzero(kept)


def compact_run(path: str | os.PathLike[str], *, keep: Keep | int | None = None) -> dict[str, int]:
    """Seal what a killed process left open, drop superseded steps, rebuild missing rollups, apply a retention policy.

    A crash at any moment leaves a run that reads: each file is replaced as a whole, the rollups before the steps.

    Args:
        path: The run directory; no writer may be alive.
        keep: Which steps to keep in full resolution; a number means the last so many. None keeps all.

    Returns:
        Bytes and steps before and after: `bytes_before`, `bytes_after`, `steps_before`, `steps_after`.

    Raises:
        RunNotFoundError: When there is no run.
        RunLockedError: When a writer is alive.
    """
    policy = Keep(last=keep) if isinstance(keep, int) else keep
    place, disk = Path(path), Disk()
    if not place.is_dir():
        raise RunNotFoundError(f"{path} is no directory of this machine")
    before = RunReader(path)
    lock = Lock(place / LOCK_FILE)
    try:
        numbers = {"bytes_before": _bytes(place), "steps_before": len(before)}
        make_folders(place, disk)
        seal_all(place, disk)
        catalog = Catalog(LocalFiles(place))
        events = sorted({f.first_step for f in before.finding_list()} | {a.step for a in before.action_list()})
        end = catalog.last_step() + 1
        for stem, segment, rows in catalog.readable():
            kept = np.arange(rows.stop)
            if policy is not None:
                kept = policy.rows(segment.step[rows], end=end, events=events)
            _rewrite(place, stem, segment, disk, counted=rows.stop, kept=kept)
        _remove_superseded(place, catalog, disk)
    finally:
        lock.release()
    return {**numbers, "bytes_after": _bytes(place), "steps_after": len(RunReader(path))}


def _rewrite(place: Path, stem: Stem, segment: Segment, disk: Disk, *, counted: int, kept: Ints) -> None:
    """Put a segment in order: rollups of what counts, then of the steps those that are kept."""
    name = f"{stem}{SEALED_SUFFIX}"
    is_whole = counted == segment.count
    if is_whole and len(kept) == counted and (place / ROLLUPS / name).exists():
        return
    parameters = tuple(map(Parameter, segment.layout.parameters))
    batch = segment.batch(parameters, None)[:counted]
    if not is_whole or not (place / ROLLUPS / name).exists():
        rollups = encode_rollups(rollups_of(columns_of(batch)), last_step=int(batch.step[-1]))
        disk.replace(place / ROLLUPS / name, rollups)
    if is_whole and len(kept) == counted:
        return
    # A segment without rows would be no segment: its last row stays, and its rollups count.
    columns = columns_of(select(batch, kept if len(kept) else np.array([counted - 1])))
    samples = encode_samples(columns)
    if samples is not None:
        disk.replace(place / SAMPLES / name, samples)
    disk.replace(place / STEPS / name, encode_steps(columns))
    if samples is None:
        disk.remove(place / SAMPLES / name)


def _remove_superseded(place: Path, catalog: Catalog, disk: Disk) -> None:
    """Remove the segments of which no step counts any more."""
    for stem in catalog.stems():
        limit = catalog.limit(stem)
        if limit is not None and limit <= stem.first:
            for folder in (STEPS, SAMPLES, ROLLUPS):
                disk.remove(place / folder / f"{stem}{SEALED_SUFFIX}")


def _bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
