"""Records a run while it trains: the training thread hands rows over, a thread of ours does the rest."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.errors import ConfigurationError, RunError
from gradwatch.records import NOT_MEASURED, RunInfo, StepBatch
from gradwatch.storage.batches import join, select
from gradwatch.storage.disk import Disk
from gradwatch.storage.events import encode_event
from gradwatch.storage.layout import Layout
from gradwatch.storage.store import Store

logger = logging.getLogger("gradwatch")

#: Up to how many bytes wait for a disk that cannot follow.
MAX_PENDING = 32 << 20
#: A waiting row costs this much beyond its norms.
_ROW_BYTES = 2000
#: (share of MAX_PENDING that waits, one step in so many is kept), from the fullest; below the last all are kept.
THINNING = ((0.75, 100), (0.5, 10))
#: Seconds between signs of life in run.json, between syncs of the open segment, and to the next try after a failure.
HEARTBEAT, SYNC, RETRY = 15.0, 5.0, (0.5, 30.0)


class RunWriter:
    """Writes one run directory.

    Nothing is raised after construction. When the disk is full or too slow, steps wait in memory, up to 32 MiB; when half
    of that is taken only every 10th step is kept, at three quarters every 100th, and none when it is full; a step whose
    global norm is not finite is kept as long as there is room. What was left out is counted in `dropped_steps` and marked
    in the events. A forked child writes nothing.

    Args:
        path: The run directory.
        info: Facts of the run; host, process, start and status are filled in.
        overwrite: Delete the run that is there.
        resume: Go on with the run that is there; a number is the first step to be written, and what was recorded from
            there on is superseded.
        flush_every: At most so many steps are lost when the process is killed...
        flush_seconds: ...or those of so many seconds.

    Raises:
        RunExistsError: When there is a run and neither `overwrite` nor `resume` is set.
        RunFormatError: When the directory holds something else, or a run of a newer version.
        RunLockedError: When another process writes to it; names the process.

    Examples:
        >>> import tempfile
        >>> from gradwatch.records import Parameter
        >>> parameters = (Parameter("fc.weight"),)
        >>> writer = RunWriter(tempfile.mkdtemp() + "/run", RunInfo(parameters))
        >>> writer.write(StepBatch(parameters, np.array([0]), np.array([[0.5]], np.float32), {"loss": np.array([0.7])}))
        >>> writer.close()
    """

    #: What touches the files; tests put in one that fails.
    disk_type: type[Disk] = Disk

    def __init__(
        self,
        path: str | os.PathLike[str],
        info: RunInfo,
        *,
        overwrite: bool = False,
        resume: bool | int = False,
        flush_every: int = 50,
        flush_seconds: float = 2.0,
    ) -> None:
        _check(info, flush_every=flush_every, flush_seconds=flush_seconds, overwrite=overwrite, resume=resume)
        self.path = Path(path)
        self.flush_every, self.flush_seconds = flush_every, flush_seconds
        self.dropped_steps = 0
        now = time.time()
        info = dataclasses.replace(
            info,
            status="running",
            status_detail="",
            started=info.started or now,
            heartbeat=now,
            ended=None,
            host=info.host or os.uname().nodename,
            pid=os.getpid(),
        )
        self._store = Store(self.path, info, overwrite=overwrite, resume=resume, disk=self.disk_type())
        #: The step after the last recorded one: where a resumed run goes on.
        self.next_step = self._store.next_step
        self._pid = os.getpid()
        self._batches: deque[StepBatch] = deque()
        self._events: deque[tuple[bytes, bool]] = deque()
        self._changes: deque[dict[str, Any]] = deque()
        # Each counter is written by one thread only: `_put` by the trainer's, `_taken` by ours.
        self._put_steps = self._taken_steps = self._put_bytes = self._taken_bytes = 0
        self._thinned: list[int] = []
        self._closing: tuple[str, str] | None = None
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="gradwatch-writer", daemon=True)
        self._thread.start()

    @property
    def bytes_written(self) -> int:
        """Bytes written to disk by this process so far."""
        return self._store.bytes_written

    # -- called from the training thread -----------------------------------------------------------------------------

    def write(self, batch: StepBatch) -> None:
        """Hand over steps; the arrays belong to the writer from now on. Takes microseconds and never waits."""
        if self._closed or os.getpid() != self._pid or not len(batch.step):
            return
        waiting = self._put_bytes - self._taken_bytes
        if waiting > MAX_PENDING * THINNING[-1][0]:
            thinned = self._thin(batch, waiting)
            if thinned is None:
                return
            batch = thinned
        self._put_bytes += _size(batch)
        self._put_steps += len(batch.step)
        self._batches.append(batch)
        if self._put_steps - self._taken_steps >= self.flush_every and not self._wake.is_set():
            self._wake.set()

    def event(self, kind: str, data: Mapping[str, Any], *, sync: bool = False) -> None:
        """Add a line to the events: `finding`, `action`, `alert` or `mark`.

        Args:
            kind: What it is.
            data: JSON types.
            sync: Have it safe from a power cut at once (critical findings); does not wait for it either.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._events.append((encode_event(kind, data), sync))
        if sync:
            self._wake.set()

    def update_info(self, **changes: Any) -> None:
        """Replace fields of the `RunInfo` in run.json, soon."""
        if self._closed or os.getpid() != self._pid:
            return
        self._changes.append(changes)
        self._wake.set()

    def close(self, status: str = "finished", detail: str = "") -> None:
        """Write everything, seal the last segment, let the lock go. A second call does nothing."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._closing = (status, detail)
        self._wake.set()
        self._thread.join()

    def _thin(self, batch: StepBatch, waiting: int) -> StepBatch | None:
        """What is kept of the batch while the disk cannot follow."""
        stride = next((stride for share, stride in THINNING if waiting > share * MAX_PENDING), 1)
        if waiting >= MAX_PENDING:
            rows = np.empty(0, np.int64)
        else:
            norm = batch.metric("global_norm")
            rows = np.flatnonzero((batch.step % stride == 0) | ~(np.isfinite(norm) | (norm == NOT_MEASURED)))
        self.dropped_steps += len(batch.step) - len(rows)
        if len(rows) == len(batch.step):
            return batch
        return select(batch, rows) if len(rows) else None

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = RETRY[0]
        heartbeat = sync = time.monotonic()
        marked = 0
        held: list[StepBatch] = []
        while True:
            self._wake.wait(self.flush_seconds)
            self._wake.clear()
            closing = self._closing is not None
            try:
                while self._batches:
                    held = self._take(held)
                    self._flush(held)
                    held = []
            except OSError as e:
                if closing:
                    break
                time.sleep(pause)
                continue
            self._do_events()
            if self._changes:
                self._apply()
                self._store.write_facts(sync=False)
            if closing:
                break
            if self._store.is_full:
                self._store.end_segment()
            self._store.seal()
        status, detail = self._closing or ("finished", "")
        self._store.facts.info = dataclasses.replace(self._store.facts.info, status=status, status_detail=detail, ended=time.time(), heartbeat=time.time())
        self._store.end_segment()
        self._store.seal()
        self._store.write_facts(sync=True)
        self._store.release()

    def _apply(self):
        while self._changes:
            self._store.facts.info = dataclasses.replace(self._store.facts.info, **self._changes.popleft())

    def _do_events(self):
        while self._events:
            line, sync = self._events.popleft()
            self._store.append_events(line, sync=sync)

    def _take(self, held):
        first = held or [self._batches.popleft()]
        layout = Layout.of(first[0])
        out = first
        while self._batches and len(out) < 1000:
            nxt = self._batches[0]
            if nxt.parameters is not out[0].parameters and nxt.parameters != out[0].parameters:
                break
            if nxt.modules != out[0].modules: break
            if nxt.step[0] <= out[-1].step[-1]: break
            out.append(self._batches.popleft())
        return out

    def _flush(self, batches):
        layout = Layout.of(batches[0])
        for b in batches[1:]:
            layout = layout.joined(Layout.of(b)) or layout
        self._store.append(join(batches, layout))
        self._taken_steps += sum(len(b) for b in batches)
        self._taken_bytes += sum(_size(b) for b in batches)


def _size(batch: StepBatch) -> int:
    size = batch.grad_norm.nbytes + _ROW_BYTES * len(batch.step)
    for samples in batch.statistics.values():
        size += samples.values.nbytes
    return size


def _check(info, *, flush_every, flush_seconds, overwrite, resume):
    if flush_every < 1:
        raise ConfigurationError.of("flush_every", ">= 1", flush_every)
    if flush_seconds <= 0:
        raise ConfigurationError.of("flush_seconds", "> 0", flush_seconds)
    if overwrite and resume is not False:
        raise ConfigurationError("'overwrite' and 'resume' exclude each other")
    names = [p.name for p in info.parameters]
    if len(set(names)) != len(names):
        double = next(n for n in names if names.count(n) > 1)
        raise ConfigurationError(f"two parameters have the name {double!r}")
