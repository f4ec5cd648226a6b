"""The thread that takes rows and events from the training and brings them to disk."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradwatch.records import StepBatch
from gradwatch.storage.batches import ascending_runs, join
from gradwatch.storage.events import THINNED, encode_event
from gradwatch.storage.layout import Layout
from gradwatch.storage.pace import Breather
from gradwatch.storage.store import Store

logger = logging.getLogger("gradwatch")

#: Seconds between signs of life in run.json, and between syncs of what was flushed.
HEARTBEAT, SYNC = 15.0, 5.0
#: Seconds until the first and the longest until the next try after the disk failed.
FIRST_RETRY, LAST_RETRY = 0.5, 30.0
#: Seconds between looks whether a pause is over or the run ends.
_GLANCE = 0.05
#: At most so many bytes of rows go into one flush.
_FLUSH_BYTES = 4 << 20
#: What a waiting row costs beyond its numbers.
_ROW_BYTES = 1500


class Recorder:
    """Brings to a store what other threads put into its queues.

    `put_*` counters are written by the training thread only, `taken_*` by this thread only, so neither needs a lock.

    Args:
        store: Opened; belongs to this thread from now on.
        flush_seconds: Longest time between looks at the queues.
    """

    def __init__(self, store: Store, flush_seconds: float) -> None:
        self.store, self._flush_seconds = store, flush_seconds
        self.batches: deque[StepBatch] = deque()
        self.events: deque[tuple[bytes, bool]] = deque()
        self.changes: deque[dict[str, Any]] = deque()
        self.put_steps = self.put_bytes = self.taken_steps = self.taken_bytes = 0
        #: Steps left out because the disk could not follow, and where the last such stretch began and ended.
        self.thinned_steps, self.thinned_first, self.thinned_last = 0, -1, -1
        #: Steps that could never be written.
        self.lost_steps = 0
        self.wake = threading.Event()
        self._ending: tuple[str, str] | None = None
        self._rows: list[StepBatch] = []
        self._marked = 0
        self._heartbeat = self._sync = time.monotonic()
        self._unsynced = False
        self._trouble = _Trouble(store.path)
        self._thread = threading.Thread(target=self._run, name="gradwatch-writer", daemon=True)
        self._thread.start()

    def close(self, status: str, detail: str) -> None:
        """Bring everything to disk, seal, release; returns when that is done."""
        self._ending = (status, detail)
        self.wake.set()
        self._thread.join()

    def _run(self) -> None:
        while self._ending is None:
            self.wake.wait(self._flush_seconds)
            while self._ending is None and not self._trouble.is_over_pause:
                time.sleep(_GLANCE)
            self.wake.clear()
            self._work()
        self._finish(*self._ending)

    def _work(self) -> None:
        """One round. What fails stays in its queue, and does not keep the other parts from their work."""
        guard = self._trouble.guard
        done = [guard("steps", self._flush_rows), guard("events", self._flush_events)]
        done += [guard("run.json", self._flush_facts), guard("sync", self._sync_if_due)]
        if self.store.is_full:
            self.store.end_segment()
        if self.store.has_ended:
            done.append(guard("seal", self.store.seal))
        self._trouble.round(all(done))

    def _finish(self, status: str, detail: str) -> None:
        guard = self._trouble.guard
        for part in (self._flush_rows, self._mark_thinning, self._flush_events, self._apply_changes):
            guard("the end", part)
        self.lost_steps += self.put_steps - self.taken_steps
        guard("the end", lambda: self.store.finish(status, detail, overhead=self._counters()))
        if self.lost_steps:
            logger.error("gradwatch: %d steps could not be written to %s", self.lost_steps, self.store.path)
        self.store.release()

    # -- parts of a round ----------------------------------------------------------------------------------------------

    def _flush_rows(self) -> None:
        breathe = Breather()
        while self._rows or self.batches:
            if not self._rows:
                self._rows = self._take()
            while self._rows:
                self._append(self._rows[0])
                self._rows.pop(0)
                breathe()

    def _append(self, rows: StepBatch) -> None:
        try:
            self.store.append(rows)
            self._unsynced = True
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 -- rows that cannot be encoded must not stop those that follow
            self.lost_steps += len(rows)
            self._trouble.note("rows", error)
        self.taken_steps += len(rows)
        self.taken_bytes += weight(rows)

    def _take(self) -> list[StepBatch]:
        """Batches from the queue, joined as far as they fit together."""
        first = self.batches.popleft()
        group, size = [first], weight(first)
        layout = Layout.of(first)
        while self.batches and size < _FLUSH_BYTES:
            following = self.batches[0]
            if following.parameters is not first.parameters and following.parameters != first.parameters:
                break
            joined = layout.joined(Layout.of(following)) if _differs(following, group[-1]) else layout
            if joined is None or following.step[0] <= group[-1].step[-1]:
                break
            layout = joined
            group.append(self.batches.popleft())
            size += weight(following)
        rows = join(group, layout)
        return [rows[part] for part in ascending_runs(rows.step)]

    def _flush_events(self) -> None:
        if self.thinned_steps > self._marked and not self.batches:
            self._mark_thinning()
        while self.events:
            line, sync = self.events[0]
            self.store.append_events(line, sync=sync)
            self.events.popleft()
            self._unsynced = True

    def _mark_thinning(self) -> None:
        dropped = self.thinned_steps - self._marked
        if not dropped:
            return
        data = {"name": THINNED, "first_step": self.thinned_first, "last_step": self.thinned_last, "dropped": dropped}
        self.store.append_events(encode_event("mark", data), sync=False)
        self._marked += dropped
        logger.warning(
            "gradwatch: the disk could not follow; %d steps were not recorded (%s)", dropped, self.store.path
        )

    def _flush_facts(self) -> None:
        due = time.monotonic() - self._heartbeat >= HEARTBEAT
        if self.changes or due:
            self._apply_changes()
            self.store.write_facts(sync=False, overhead=self._counters())
            self._heartbeat = time.monotonic()

    def _apply_changes(self) -> None:
        while self.changes:
            self.store.update(self.changes[0])
            self.changes.popleft()

    def _sync_if_due(self) -> None:
        if self._unsynced and time.monotonic() - self._sync >= SYNC:
            self.store.sync()
            self._sync, self._unsynced = time.monotonic(), False

    def _counters(self) -> dict[str, int]:
        return {"bytes_written": self.store.bytes_written, "dropped_steps": self.thinned_steps + self.lost_steps}


class _Trouble:
    """Keeps failures of the disk and of our own code inside the thread: logs the first, tries less and less often.

    Args:
        path: Of the run, for the log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pause = 0.0
        self._until = 0.0
        self._seen: set[str] = set()

    @property
    def is_over_pause(self) -> bool:
        """Whether the next try is due."""
        return time.monotonic() >= self._until

    def guard(self, part: str, work: Callable[[], object]) -> bool:
        """Whether `work()` went through."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 -- nothing may end this thread
            self.note(part, error)
            return False
        return True

    def note(self, part: str, error: Exception) -> None:
        """Log a failure, the first of its kind since all was well."""
        kind = f"{part}: {type(error).__name__}: {error}"
        if part not in self._seen:
            self._seen.add(part)
            expected = isinstance(error, OSError)
            message = "gradwatch: cannot write to %s (%s); training goes on, and the writer tries again"
            logger.warning(message, self._path, kind, exc_info=None if expected else error)

    def round(self, done: bool) -> None:
        """A round is over: wait longer after each that failed."""
        if done:
            self._pause = 0.0
            self._seen.clear()
        else:
            self._pause = min(LAST_RETRY, 2 * self._pause or FIRST_RETRY)
        self._until = time.monotonic() + self._pause


def weight(batch: StepBatch) -> int:
    """About how many bytes a batch takes while it waits; that of a batch is the sum of those of its parts."""
    size = batch.grad_norm.nbytes + _ROW_BYTES * len(batch.step)
    for samples in batch.statistics.values():
        size += samples.values.nbytes
    return size


def _differs(batch: StepBatch, other: StepBatch) -> bool:
    """Whether the layouts may differ; cheap where they do not."""
    return (
        batch.metrics.keys() != other.metrics.keys()
        or batch.statistics.keys() != other.statistics.keys()
        or batch.modules != other.modules
    )
