"""The writing side of a run directory, on the thread that calls it: segments, events, `run.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradwatch.errors import RunCorruptError, RunExistsError, RunFormatError
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
    STEPS,
    TEMPORARY_SUFFIX,
    Layout,
    Stem,
)
from gradwatch.storage.lock import Lock
from gradwatch.storage.open_segment import OpenSegment
from gradwatch.storage.sealing import seal

#: An open segment is sealed when it holds this many bytes or rows, or is this old (seconds).
SEAL_BYTES, SEAL_ROWS, SEAL_SECONDS = 16 << 20, 1 << 16, 3600.0
_FOLDERS = (STEPS, SAMPLES, ROLLUPS)
_OURS = {RUN_FILE, RUN_FILE + TEMPORARY_SUFFIX, EVENTS_FILE, LOCK_FILE, *_FOLDERS}


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
        self,
        path: Path,
        info: RunInfo,
        *,
        overwrite: bool = False,
        resume: bool | int = False,
        disk: Disk | None = None,
    ) -> None:
        self.path, self.disk = path, disk or Disk()
        self.bytes_written = 0
        exists = _look_at(path)
        if exists and not overwrite and resume is False:
            raise RunExistsError(
                f"there is a run at {path} already: say resume=True to go on with it, or overwrite=True"
            )
        path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path / LOCK_FILE)
        #: Whether there is something to seal.
        self.has_ended = exists
        self._open: OpenSegment | None = None
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
            info = dataclasses.replace(
                info, parameters=merged(old.info.parameters, info.parameters), started=old.info.started
            )
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
        assert self._events is not None
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
            joined = self._open.layout.joined(layout)
            if joined != self._open.layout or first <= self._reached:
                self.end_segment()
                layout = joined or layout
        if self._open is None:
            self._begin_segment(layout, batch.parameters, min(first, self.next_step) if self._reached < 0 else first)
        assert self._open is not None
        self.bytes_written += self._open.append(batch)
        self._reached = int(batch.step[-1])
        self.next_step = self._reached + 1

    def _begin_segment(self, layout: Layout, parameters: tuple[Parameter, ...], first: int) -> None:
        known = merged(self.facts.info.parameters, parameters)
        if known != self.facts.info.parameters:
            self.facts.info = dataclasses.replace(self.facts.info, parameters=known)
            self.write_facts(sync=False)
        path = self.path / STEPS / f"{Stem(self._sequence, max(0, first))}{OPEN_SUFFIX}"
        self._open = OpenSegment(self.disk, path, layout)
        self._sequence += 1

    def append_events(self, lines: bytes, *, sync: bool) -> None:
        """Append whole lines to the events."""
        assert self._events is not None
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

    def update(self, changes: Mapping[str, Any]) -> None:
        """Change fields of the `RunInfo`; `write_facts` brings them to disk."""
        self.facts.info = dataclasses.replace(self.facts.info, **changes)

    def write_facts(self, *, sync: bool, overhead: Mapping[str, Any] | None = None) -> None:
        """Replace `run.json`, with a new heartbeat and further numbers on gradwatch itself."""
        info = self.facts.info
        self.facts.info = dataclasses.replace(
            info, heartbeat=time.time(), overhead={**info.overhead, **(overhead or {})}
        )
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
            self.has_ended = True
            segment.close()

    def seal(self) -> None:
        """Turn the streams that are ended into Parquet, with rollups."""
        current = self._open.path.name if self._open else ""
        for name in sorted(LocalFiles(self.path).listing(STEPS)):
            stem = Stem.parse(name.removesuffix(OPEN_SUFFIX))
            if stem and name.endswith(OPEN_SUFFIX) and name != current:
                self.bytes_written += seal(self.path, stem, self.disk)
        self.has_ended = False

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(
        self, status: str, detail: str = "", *, overhead: Mapping[str, Any] | None = None, now: float | None = None
    ) -> None:
        """Seal all and write how the run ended."""
        ended = time.time() if now is None else now
        self.update({"status": status, "status_detail": detail, "ended": None if status == "running" else ended})
        self.facts.processes[-1] |= {"status": status, "ended": ended}
        try:
            self.end_segment()
            self.seal()
        finally:
            self.write_facts(sync=True, overhead=overhead)

    def release(self) -> None:
        """Close all files and let the lock go."""
        with contextlib.suppress(OSError):
            self.end_segment()
        if self._events is not None:
            os.close(self._events)
            self._events = None
        self._lock.release()


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
    if path.exists() and not path.is_dir():
        raise RunFormatError(f"{path} is a file, not a run directory")
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if not names - {LOCK_FILE}:
        return False
    if RUN_FILE in names:
        with contextlib.suppress(RunCorruptError):  # a damaged one can be overwritten, and perhaps resumed
            decode_facts(LocalFiles(path).read(RUN_FILE), str(path / RUN_FILE))
    elif not names <= _OURS:
        raise RunFormatError(f"{path} holds something else than a run of gradwatch: choose another directory")
    return True
