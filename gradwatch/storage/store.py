"""The writing side of a run directory, on the thread that calls it: segments, events, `run.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradwatch.errors import RunExistsError
from gradwatch.records import Parameter, RunInfo, StepBatch
from gradwatch.storage.appending import AppendFile
from gradwatch.storage.batches import ascending_runs
from gradwatch.storage.catalog import Catalog
from gradwatch.storage.claiming import delete_run, holds_run, make_folders
from gradwatch.storage.disk import Disk, opened
from gradwatch.storage.events import RESUMED, encode_event, whole_lines
from gradwatch.storage.facts import Facts
from gradwatch.storage.files import LocalFiles
from gradwatch.storage.layout import EVENTS_FILE, LOCK_FILE, OPEN_SUFFIX, RUN_FILE, STEPS, Layout, Stem
from gradwatch.storage.lock import Lock
from gradwatch.storage.open_segment import OpenSegment
from gradwatch.storage.sealing import seal

#: An open segment is sealed when it holds this many bytes or rows, or is this old (seconds).
SEAL_BYTES, SEAL_ROWS, SEAL_SECONDS = 8 << 20, 1 << 16, 3600.0
#: How often sealing waits for steps that were written and cannot be read back.
READ_TRIES = 5


class Store:
    """One run directory, opened for writing and locked.

    Two threads may use it, one that appends and one that calls `sync`, `seal` and `write_facts`.

    Args:
        path: The run directory; created if missing.
        info: Facts of the run.
        overwrite: Delete the run that is there.
        resume: Go on with the run that is there; a number is the first step that will be written, and what was
            recorded from there on is superseded.
        disk: What touches the files.

    Attributes:
        next_step: The step after the last one.
        facts: Content of run.json.
        bytes_written: So far, of steps and events.
        bytes_sealed: So far, of sealed segments and run.json.

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
        self.bytes_written = self.bytes_sealed = 0
        self._open: OpenSegment | None = None
        self._events: AppendFile | None = None
        self._facts_lock = threading.Lock()
        #: Steps in the streams of this process that are ended, and how often their sealing was tried.
        self._rows: dict[Stem, int] = {}
        self._tries: dict[Stem, int] = {}
        exists = holds_run(path)
        if exists and not overwrite and resume is False:
            message = f"there is a run at {path} already: say resume=True to go on with it, or overwrite=True"
            raise RunExistsError(message)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path / LOCK_FILE)
        try:
            if exists and overwrite:
                delete_run(path, self.disk)
            self._resumes = exists and not overwrite
            self.facts = self._first_facts(info, resume)
            self.write_facts()
            make_folders(path, self.disk)
            self._events = self._open_events()
        except BaseException:
            self.release()
            raise

    def _first_facts(self, info: RunInfo, resume: bool | int) -> Facts:
        """The facts to start from; finds the place to go on."""
        catalog = Catalog(LocalFiles(self.path))
        stems = catalog.stems()
        self._ended = deque(stem for stem in stems if not catalog.is_sealed(stem))
        self._sequence = stems[-1].sequence + 1 if stems else 0
        #: The last step recorded so far, and the step from which on the next segment answers.
        self._reached = catalog.last_step() if self._resumes else -1
        self.next_step = self._reached + 1 if isinstance(resume, bool) else int(resume)
        self._claim: int | None = self.next_step
        processes: list[dict[str, Any]] = []
        if self._resumes:
            old = catalog.facts()
            processes = old.processes
            parameters = merged(old.info.parameters, info.parameters)
            info = dataclasses.replace(info, parameters=parameters, started=old.info.started)
        process = {"host": info.host, "pid": info.pid, "started": time.time(), "ended": None, "status": "running"}
        process |= {"first_step": self.next_step, "versions": dict(info.versions)}
        return Facts(info, [*processes, process])

    def _open_events(self) -> AppendFile:
        """The events, without a line that a dying process left torn."""
        files = LocalFiles(self.path)
        size = whole_lines(files.read(EVENTS_FILE)) if EVENTS_FILE in files.listing("") else 0
        return AppendFile(self.disk, self.path / EVENTS_FILE, size=size)

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, batch: StepBatch) -> None:
        """Append steps; begins another segment where the columns change, or steps come that are there already."""
        for rows in ascending_runs(batch.step):
            self._append(batch[rows] if rows.stop - rows.start < len(batch) else batch)

    def _append(self, batch: StepBatch) -> None:
        layout, first = Layout.of(batch), int(batch.step[0])
        if self._open is not None:
            joined = self._open.layout.joined(layout)
            if joined != self._open.layout or first <= self._reached:
                self.end_segment()
                layout = joined or layout
        segment = self._open or self._begin_segment(layout, batch.parameters, first)
        self.bytes_written += segment.append(batch)
        self._reached = int(batch.step[-1])
        self.next_step = self._reached + 1

    def _begin_segment(self, layout: Layout, parameters: tuple[Parameter, ...], first: int) -> OpenSegment:
        first = max(0, first if self._claim is None else min(first, self._claim))
        known = merged(self.facts.info.parameters, parameters)
        if known != self.facts.info.parameters:
            self.update({"parameters": known})
            self.write_facts()
        if self._resumes or first <= self._reached:
            self.append_events(encode_event("mark", {"name": RESUMED, "step": first}))
        self._open = OpenSegment(self.disk, self.path / STEPS, Stem(self._sequence, first), layout)
        self._sequence += 1
        self._claim, self._resumes = None, False
        return self._open

    def append_events(self, lines: bytes) -> None:
        """Append whole lines to the events."""
        if self._events is not None:
            self._events.append(lines)
            self.bytes_written += len(lines)

    def update(self, changes: Mapping[str, Any]) -> None:
        """Change fields of the `RunInfo`; `write_facts` brings them to disk."""
        with self._facts_lock:
            self.facts.info = dataclasses.replace(self.facts.info, **changes)

    def write_facts(self, *, overhead: Mapping[str, Any] | None = None) -> None:
        """Replace `run.json`, with a new heartbeat and further numbers on gradwatch itself."""
        with self._facts_lock:
            info, now = self.facts.info, time.time()
            self.facts.info = dataclasses.replace(info, heartbeat=now, overhead={**info.overhead, **(overhead or {})})
            data = self.facts.encode()
            self.disk.replace(self.path / RUN_FILE, data)
        self.bytes_sealed += len(data)

    def sync(self) -> None:
        """Make all steps and events so far safe from a power cut."""
        for stem in tuple(self._ended):
            with contextlib.suppress(FileNotFoundError):
                self._sync_ended(self.path / STEPS / f"{stem}{OPEN_SUFFIX}")
        for file in (self._open, self._events):
            if file is not None:
                file.sync()

    def _sync_ended(self, path: Path) -> None:
        with opened(path, os.O_RDONLY, "rb") as file:
            self.disk.sync(file.fileno())
            self.disk.sync_folder(path.parent)

    # -- sealing -------------------------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether the open segment is due to be sealed."""
        segment = self._open
        if segment is None:
            return False
        age = time.monotonic() - segment.since
        return segment.size >= SEAL_BYTES or segment.rows >= SEAL_ROWS or age >= SEAL_SECONDS

    def end_segment(self) -> None:
        """Close the open segment; the next step begins another. `seal` turns it into Parquet."""
        if self._open is not None:
            segment = self._open
            segment.close()
            self._rows[segment.stem] = segment.rows
            self._ended.append(segment.stem)
            self._open = None

    @property
    def has_ended(self) -> bool:
        """Whether there is a segment to seal."""
        return bool(self._ended)

    def seal(self) -> None:
        """Turn the streams that are ended into Parquet, with rollups."""
        while self._ended:
            stem = self._ended[0]
            self._tries[stem] = self._tries.get(stem, 0) + 1
            # What cannot be read again and again is lost: sealed without it, the rest goes on.
            rows = self._rows.get(stem, 0) if self._tries[stem] <= READ_TRIES else 0
            self.bytes_sealed += seal(self.path, stem, self.disk, rows=rows)
            for known in (self._rows, self._tries):
                known.pop(stem, None)
            self._ended.popleft()

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(
        self, status: str, detail: str = "", *, overhead: Mapping[str, Any] | None = None, now: float | None = None
    ) -> None:
        """Seal all and write how the run ended."""
        ended = None if status == "running" else time.time() if now is None else now
        self.update({"status": status, "status_detail": detail, "ended": ended})
        self.facts.processes[-1] |= {"status": status, "ended": ended}
        try:
            self.sync()
            self.end_segment()
            self.seal()
        finally:
            self.write_facts(overhead=overhead)

    def release(self) -> None:
        """Close all files and let the lock go."""
        with contextlib.suppress(OSError):
            self.end_segment()
        if self._events is not None:
            self._events.close()
            self._events = None
        self._lock.release()


def merged(old: Sequence[Parameter], new: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """The old parameters as the new ones describe them, then those that are only new."""
    by_name = {parameter.name: parameter for parameter in new}
    known = {parameter.name for parameter in old}
    together = tuple(by_name.get(p.name, p) for p in old) + tuple(p for p in new if p.name not in known)
    return tuple(old) if together == tuple(old) else together
