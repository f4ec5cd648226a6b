"""The threads that take rows and events from the training and bring them to disk."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from gradwatch.records import StepBatch
from gradwatch.storage.batches import ascending_runs, join
from gradwatch.storage.events import THINNED, encode_event
from gradwatch.storage.layout import Layout
from gradwatch.storage.pace import Breather
from gradwatch.storage.store import Store
from gradwatch.storage.trouble import Trouble

logger = logging.getLogger("gradwatch")

#: Seconds between signs of life in run.json, and between syncs of what was flushed.
HEARTBEAT, SYNC = 15.0, 5.0
#: Seconds between looks whether a pause after a failure is over, or the run ends.
_GLANCE = 0.05
#: Pauses between the last tries at the end of a run, while the disk fails.
_LAST_TRIES = (0.1, 0.3, 0.6, 0.6)
#: How long the end of a run waits for a disk that does not answer.
_PATIENCE = 120.0
#: At most so many bytes of rows go into one flush.
_FLUSH_BYTES = 4 << 20
#: What a waiting row costs beyond its numbers.
_ROW_BYTES = 1500


class Loop:
    """A thread that works whenever it is woken, and every so often; slower while the disk fails.

    Nothing runs before `start`, so that an interrupt while it is made leaves no thread that nobody knows.

    Args:
        name: Of the thread.
        store: Whose files it works on.
        seconds: Longest time between rounds.
        work: One round: says whether all went through.
    """

    def __init__(self, name: str, store: Store, seconds: float, work: Callable[[Trouble], bool]) -> None:
        self.wake = threading.Event()
        self._seconds, self._work = seconds, work
        self._trouble = Trouble(store.path)
        self._is_ending = self._is_over = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over:
            try:
                self._live()
            except Exception as error:  # noqa: BLE001 -- nothing may end this thread
                self._trouble.note("thread", error)

    def _live(self) -> None:
        while not self._is_ending:
            if not self._trouble.guard("thread", self._turn):
                time.sleep(_GLANCE)
        for pause in _LAST_TRIES:
            if self._work(self._trouble):
                break
            time.sleep(pause)
        self._is_over = True

    def _turn(self) -> None:
        self.wake.wait(self._seconds)
        while not self._is_ending and not self._trouble.is_over_pause:
            time.sleep(_GLANCE)
        self.wake.clear()
        self._trouble.round(self._work(self._trouble))

    @property
    def failures(self) -> int:
        """Failures so far."""
        return self._trouble.failures

    def end(self) -> bool:
        """A last round, or some while the disk fails; whether the thread is gone then, and does not hang in a call."""
        self._is_ending = True
        self.wake.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)
        return not self._thread.is_alive()


class Recorder:
    """Brings to a store what the training thread puts into the queues.

    Two threads, so that a slow sync or the sealing of a segment never delays a flush: one appends rows and events, the
    other syncs, seals and writes run.json. The counters `put_*` are written by whoever puts, one at a time, and the
    others by the first thread only, so none needs a lock.

    Args:
        store: Opened; belongs to the threads from now on.
        flush_seconds: Longest time between flushes.
    """

    def __init__(self, store: Store, flush_seconds: float) -> None:
        self.store = store
        self.batches: deque[StepBatch] = deque()
        self.events: deque[tuple[bytes, bool]] = deque()
        self.changes: deque[dict[str, Any]] = deque()
        self.put_steps = self.put_bytes = 0
        self._taken_steps = self._taken_bytes = 0
        #: Steps left out because the disk could not follow, and the first and last of the present stretch.
        self.thinned_steps, self.thinned_first, self.thinned_last = 0, -1, -1
        #: Steps that could never be written.
        self.lost_steps = 0
        #: Batches among them that could not be encoded.
        self.failed_rows = 0
        #: Puts steps that wait elsewhere for company; called when none were put for a while.
        self.more: Callable[[], object] = lambda: None
        self._rows: list[StepBatch] = []
        self._marked = 0
        self._flush_seconds = flush_seconds
        self._heartbeat = self._synced = self._asked = time.monotonic()
        self._is_unsynced = self._is_urgent = False
        self._trouble = Trouble(store.path)
        self._flushing = Loop("gradwatch-writer", store, flush_seconds, self._flush)
        self._keeping = Loop("gradwatch-sealer", store, 1.0, self._keep)

    def start(self) -> None:
        """Begin to work; whatever comes of it, `close` ends it."""
        self._flushing.start()
        self._keeping.start()

    @property
    def wake(self) -> threading.Event:
        """To be set when rows or events should be flushed soon."""
        return self._flushing.wake

    @property
    def failures(self) -> int:
        """Failures of the disk, and of our own code, in the threads."""
        return self._flushing.failures + self._keeping.failures + self._trouble.failures + self.failed_rows

    @property
    def waiting_steps(self) -> int:
        """Steps that are not in the file yet."""
        return self.put_steps - self._taken_steps

    @property
    def waiting_bytes(self) -> int:
        """About how many bytes they take."""
        return self.put_bytes - self._taken_bytes

    def put(self, batch: StepBatch) -> None:
        """Take steps."""
        self.put_bytes += weight(batch)
        self.put_steps += len(batch.step)
        self.batches.append(batch)

    def change(self, changes: dict[str, Any]) -> None:
        """Change fields of run.json soon."""
        self.changes.append(changes)
        self._keeping.wake.set()

    def close(self, status: str, detail: str) -> None:
        """Bring everything to disk, seal, release; returns when that is done, or cannot be done."""
        if not (self._flushing.end() and self._keeping.end()):
            logger.error("gradwatch: the disk does not answer; %s is left as it is", self.store.path)
            return
        trouble = self._trouble
        lost = max(0, self.waiting_steps)  # what was taken twice, after a failure, was counted twice
        self.lost_steps, self._taken_steps = self.lost_steps + lost, self._taken_steps + lost
        trouble.guard("events", self._mark_thinning)
        for _ in range(3):
            if trouble.guard("the end", lambda: self.store.finish(status, detail, overhead=self._counters())):
                break
        if self.lost_steps:
            logger.error("gradwatch: %d steps could not be written to %s", self.lost_steps, self.store.path)
        self.store.release()

    # -- the first thread: rows and events -----------------------------------------------------------------------------

    def _flush(self, trouble: Trouble) -> bool:
        done = [trouble.guard("steps", self._flush_rows), trouble.guard("events", self._flush_events)]
        if self.store.is_full:
            self.store.end_segment()
            self._keeping.wake.set()
        return all(done)

    def _flush_rows(self) -> None:
        breathe = Breather()
        while self._rows or self.batches or self._ask():
            if not self._rows:
                self._take()
            while self._rows:
                self._append()
                breathe()

    def _append(self) -> None:
        """Append the first of the rows that were taken; they stay where that may go well another time."""
        rows = self._rows[0]
        size = weight(rows)
        try:
            self.store.append(rows)
            self._is_unsynced = True
        except (OSError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 -- rows that cannot be encoded must not stop those that follow
            self._lose(rows, error)
        self._rows.pop(0)
        self._taken_steps += len(rows)
        self._taken_bytes += size

    def _ask(self) -> bool:
        """Fetch the steps that wait elsewhere, if that was not done lately; whether there are any."""
        now = time.monotonic()
        if now - self._asked < self._flush_seconds / 2:
            return False
        self._asked = now
        self.more()
        return bool(self.batches)

    def _take(self) -> None:
        """Take batches from the queue, joined as far as they fit together; they leave it when that is done."""
        try:
            group, layout = self._fitting()
            rows = join(group, layout)
            self._rows = [rows[part] for part in ascending_runs(rows.step)]
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 -- as in `_append`
            rows = self.batches.popleft()
            self._lose(rows, error)
            self._taken_steps += len(rows)
            self._taken_bytes += weight(rows)
        else:
            for _ in group:
                self.batches.popleft()

    def _lose(self, rows: StepBatch, error: Exception) -> None:
        self.lost_steps += len(rows)
        self.failed_rows += 1
        logger.error("gradwatch: steps %d to %d cannot be recorded", rows.step[0], rows.step[-1], exc_info=error)

    def _fitting(self) -> tuple[list[StepBatch], Layout]:
        first = self.batches[0]
        group, size = [first], weight(first)
        layout = Layout.of(first)
        while len(group) < len(self.batches) and size < _FLUSH_BYTES:
            following = self.batches[len(group)]
            if following.parameters is not first.parameters and following.parameters != first.parameters:
                break
            joined = layout.joined(Layout.of(following)) if _differs(following, group[-1]) else layout
            if joined is None or following.step[0] <= group[-1].step[-1]:
                break
            layout = joined
            group.append(following)
            size += weight(following)
        return group, layout

    def _flush_events(self) -> None:
        if self.thinned_steps > self._marked and not self.batches:
            self._mark_thinning()
        while self.events:
            line, is_urgent = self.events[0]
            self.store.append_events(line)
            self.events.popleft()
            self._is_unsynced = True
            if is_urgent:
                self._is_urgent = True
                self._keeping.wake.set()

    def _mark_thinning(self) -> None:
        dropped = self.thinned_steps - self._marked
        if dropped:
            data = {"name": THINNED, "first_step": self.thinned_first, "last_step": self.thinned_last}
            self.store.append_events(encode_event("mark", {**data, "dropped": dropped}))
            self._marked += dropped
            logger.warning("gradwatch: the disk could not follow: %d steps not in %s", dropped, self.store.path)

    # -- the second thread: syncs, seals, run.json ---------------------------------------------------------------------

    def _keep(self, trouble: Trouble) -> bool:
        return all(
            [
                trouble.guard("sync", self._sync_if_due),
                trouble.guard("run.json", self._write_facts_if_due),
                not self.store.has_ended or trouble.guard("seal", self.store.seal),
            ]
        )

    def _sync_if_due(self) -> None:
        if self._is_urgent or (self._is_unsynced and time.monotonic() - self._synced >= SYNC):
            self._is_urgent = self._is_unsynced = False
            try:
                self.store.sync()
            except OSError:
                self._is_unsynced = True
                raise
            self._synced = time.monotonic()

    def _write_facts_if_due(self) -> None:
        if self.changes or time.monotonic() - self._heartbeat >= HEARTBEAT:
            while self.changes:
                self.store.update(self.changes.popleft())
            self.store.write_facts(overhead=self._counters())
            self._heartbeat = time.monotonic()

    def _counters(self) -> dict[str, int]:
        written = self.store.bytes_written + self.store.bytes_sealed
        dropped = self.thinned_steps + self.lost_steps
        return {"bytes_written": written, "dropped_steps": dropped, "write_failures": self.failures}


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
