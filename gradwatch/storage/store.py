"""The writing side of a run directory, on the thread that calls it: segments, events, `run.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradwatch.errors import RunExistsError, RunFormatError
from gradwatch.records import Parameter, RunInfo, StepBatch
from gradwatch.storage.batches import ascending_runs
from gradwatch.storage.catalog import Catalog
from gradwatch.storage.disk import Disk
from gradwatch.storage.events import RESUMED, encode_event, whole_lines
from gradwatch.storage.facts import Facts, decode_facts
from gradwatch.storage.files import LocalFiles
from gradwatch.storage.layout import (
    EVENTS_FILE,
    LOCK_FILE,
    OPEN_SUFFIX,
    ROLLUPS,
    RUN_FILE,
    SAMPLES,
    SEALED_SUFFIX,
    STEPS,
    TEMPORARY_SUFFIX,
    Layout,
    Stem,
)
from gradwatch.storage.lock import Lock
from gradwatch.storage.sealing import seal
from gradwatch.storage.stream import StreamEncoder

logger = logging.getLogger("gradwatch")

#: An open segment is sealed when it holds this many bytes or rows, or is this old (seconds).
SEAL_BYTES, SEAL_ROWS, SEAL_SECONDS = 16 << 20, 1 << 16, 3600.0
_FOLDERS = (STEPS, SAMPLES, ROLLUPS)
_OURS = {RUN_FILE, EVENTS_FILE, LOCK_FILE, *_FOLDERS}


class Store:
    """One run directory, opened for writing and locked.

    Args:
        path: The run directory; created if missing.
        info: Facts of the run.
        overwrite: Delete the run that is there.
        resume: Go on with the run that is there; a number is the first step that will be written, and what was
            recorded from there on is superseded.
        disk: What touches the files.

    Raises:
        RunExistsError: When there is a run and neither `overwrite` nor `resume` is set.
        RunFormatError: When the directory holds something else, or the run is of a newer version.
        RunLockedError: When another writer is alive.
    """

    def __init__(
        self, path: Path, info: RunInfo, *, overwrite: bool = False, resume: bool | int = False, disk: Disk | None = None
    ) -> None:
        self.path, self.disk = path, disk or Disk()
        self.bytes_written = 0
        exists = _look_at(path)
        if exists and not overwrite and resume is False:
            raise RunExistsError(f"there is a run at {path} already: say resume=True to go on with it, or overwrite=True")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path / LOCK_FILE)
        self._open: _OpenSegment | None = None
        self._events: int | None = None
        try:
            if exists and overwrite:
                self._clear()
                exists = False
            for folder in _FOLDERS:
                (path / folder).mkdir(exist_ok=True)
                self._remove_leftovers(path / folder)
            self.facts = self._begin(info, resume if exists else False)
            self._events = self.disk.open(path / EVENTS_FILE)
            self._mend_events()
            if exists:
                self.append_events(encode_event("mark", {"name": RESUMED, "step": self.next_step}), sync=False)
            self.write_facts(sync=True)
        except BaseException:
            self.release()
            raise

    # -- opening ---------------------------------------------------------------------------------------------------

    def _begin(self, info: RunInfo, resume: bool | int) -> Facts:
        """The facts to start from; sets `next_step` and the number of the next segment."""
        catalog = Catalog(LocalFiles(self.path))
        stems = catalog.stems()
        self._sequence = stems[-1].sequence + 1 if stems else 0
        self.next_step = (catalog.last_step() + 1 if stems else 0) if resume is True or resume is False else int(resume)
        processes: list[dict[str, Any]] = []
        if resume is not False:
            old = catalog.facts()
            processes, self._reached = old.processes, catalog.last_step()
            info = dataclasses.replace(info, parameters=merged(old.info.parameters, info.parameters), started=old.info.started)
        else:
            self._reached = -1
        process = {"host": info.host, "pid": info.pid, "started": time.time(), "first_step": self.next_step}
        return Facts(info, [*processes, {**process, "status": "running", "versions": dict(info.versions)}])

    def _clear(self) -> None:
        """Delete the run: our own files, nothing else."""
        for name in (RUN_FILE, EVENTS_FILE):
            self.disk.remove(self.path / name)
        for folder in _FOLDERS:
            if (self.path / folder).is_symlink():
                raise RunFormatError(f"{self.path / folder} is a symbolic link, which gradwatch does not follow")
            for file in sorted((self.path / folder).glob("*")):
                if Stem.parse(file.name.partition(".")[0]):
                    self.disk.remove(file)

    def _remove_leftovers(self, folder: Path) -> None:
        """Remove what a process left half-written when it died."""
        if folder.is_symlink():
            raise RunFormatError(f"{folder} is a symbolic link, which gradwatch does not follow")
        for file in folder.glob("*" + TEMPORARY_SUFFIX):
            self.disk.remove(file)

    def _mend_events(self) -> None:
        """End a line that a dying process left torn, so that the next one begins on its own."""
        assert self._events is not None  # noqa: S101
        data = LocalFiles(self.path).read(EVENTS_FILE)
        self._events_size = len(data)
        if len(data) != whole_lines(data):
            self.append_events(b"\n", sync=False)

    # -- writing ---------------------------------------------------------------------------------------------------

    def append(self, batch: StepBatch) -> None:
        """Append steps to the open segment; begins another where the columns changed or the steps start over."""
        for rows in ascending_runs(batch.step):
            self._append(batch[rows] if rows.stop - rows.start < len(batch) else batch)

    def _append(self, batch: StepBatch) -> None:
        layout, first = Layout.of(batch), int(batch.step[0])
        if self._open is not None:
            joined = self._open.encoder.layout.joined(layout)
            if joined != self._open.encoder.layout or first <= self._reached:
                self.end_segment()
                layout = joined or layout
        if self._open is None:
            self._begin_segment(layout, batch.parameters, min(first, self.next_step) if self._reached < 0 else first)
        assert self._open is not None  # noqa: S101
        self.bytes_written += self._open.append(batch)
        self._reached = int(batch.step[-1])
        self.next_step = self._reached + 1

    def _begin_segment(self, layout: Layout, parameters: tuple[Parameter, ...], first: int) -> None:
        known = merged(self.facts.info.parameters, parameters)
        if known != self.facts.info.parameters:
            self.facts.info = dataclasses.replace(self.facts.info, parameters=known)
            self.write_facts(sync=False)
        path = self.path / STEPS / f"{Stem(self._sequence, max(0, first))}{OPEN_SUFFIX}"
        self._open = _OpenSegment(self.disk, path, StreamEncoder(layout))
        self._sequence += 1

    def append_events(self, lines: bytes, *, sync: bool) -> None:
        """Append whole lines to the events."""
        assert self._events is not None  # noqa: S101
        try:
            self.disk.append(self._events, lines)
        except OSError:
            with contextlib.suppress(OSError):
                self.disk.truncate(self._events, self._events_size)
            raise
        self._events_size += len(lines)
        self.bytes_written += len(lines)
        if sync:
            self.disk.sync(self._events)

    def write_facts(self, *, sync: bool) -> None:
        """Replace `run.json`."""
        data = self.facts.encode()
        self.disk.replace(self.path / RUN_FILE, data, sync=sync)
        self.bytes_written += len(data)

    def sync(self) -> None:
        """Make all steps and events so far safe from a power cut."""
        if self._open is not None:
            self._open.sync()
        if self._events is not None:
            self.disk.sync(self._events)

    # -- sealing ---------------------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether the open segment is due to be sealed."""
        segment = self._open
        return segment is not None and (
            segment.size >= SEAL_BYTES or segment.rows >= SEAL_ROWS or time.monotonic() - segment.since >= SEAL_SECONDS
        )

    def end_segment(self) -> None:
        """Close the open segment; the next step begins another. `seal` turns it into Parquet."""
        if self._open is not None:
            segment, self._open = self._open, None
            segment.close()

    def unsealed(self) -> list[Stem]:
        """Segments that are ended and not sealed."""
        catalog = Catalog(LocalFiles(self.path))
        current = self._open.path.name if self._open else ""
        return [stem for stem in catalog.stems() if not catalog.is_sealed(stem) and f"{stem}{OPEN_SUFFIX}" != current]

    def seal(self) -> None:
        """Seal what is ended: Parquet, rollups; remove the streams."""
        for stem in self.unsealed():
            self.bytes_written += seal(self.path, stem, self.disk)

    # -- the end ---------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Close all files and let the lock go."""
        with contextlib.suppress(OSError):
            self.end_segment()
        if self._events is not None:
            import os

            os.close(self._events)
            self._events = None
        self._lock.release()


class _OpenSegment:
    """The stream that is being written.

    Args:
        disk: What touches the file.
        path: Of the file, which does not exist yet.
        encoder: Knows the columns.
    """

    def __init__(self, disk: Disk, path: Path, encoder: StreamEncoder) -> None:
        self.disk, self.path, self.encoder = disk, path, encoder
        self.rows, self.size, self.since = 0, 0, time.monotonic()
        self._file: int | None = disk.open(path)
        try:
            self._write(encoder.head)
        except BaseException:
            self.close()
            with contextlib.suppress(OSError):
                disk.remove(path)
            raise

    def append(self, batch: StepBatch) -> int:
        data = self.encoder.encode(batch)
        self._write(data)
        self.rows += len(batch)
        return len(data)

    def _write(self, data: bytes) -> None:
        assert self._file is not None  # noqa: S101
        try:
            self.disk.append(self._file, data)
        except OSError:
            # Part of a record batch in the middle of the file would hide all that follows it.
            self.disk.truncate(self._file, self.size)
            raise
        self.size += len(data)

    def sync(self) -> None:
        if self._file is not None:
            self.disk.sync(self._file)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            import os

            os.close(file)


def merged(old: Sequence[Parameter], new: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """The old parameters as the new ones describe them, then those that are only new."""
    by_name = {parameter.name: parameter for parameter in new}
    known = {parameter.name for parameter in old}
    merged = tuple(by_name.get(p.name, p) for p in old) + tuple(p for p in new if p.name not in known)
    return tuple(old) if merged == tuple(old) else merged


def _look_at(path: Path) -> bool:
    """Whether there is a run at the path.

    Raises:
        RunFormatError: When there is something else.
    """
    if not path.exists():
        return False
    if not path.is_dir():
        raise RunFormatError(f"{path} is a file, not a run directory")
    names = {entry.name for entry in path.iterdir()}
    if not names - {LOCK_FILE}:
        return False
    files = LocalFiles(path)
    if RUN_FILE in names:
        with contextlib.suppress(RunFormatError):
            pass
        try:
            decode_facts(files.read(RUN_FILE), f"{path / RUN_FILE}")
        except RunFormatError:
            raise
        except Exception:  # noqa: BLE001
            pass
        return True
    if names <= _OURS | {RUN_FILE + TEMPORARY_SUFFIX}:
        return True
    raise RunFormatError(f"{path} is not empty and not a run of gradwatch: choose another directory")
