"""Records a run while it trains: the training thread hands rows over, a thread of ours does the rest."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.errors import ConfigurationError
from gradwatch.records import NOT_MEASURED, RunInfo, StepBatch
from gradwatch.storage.batches import select
from gradwatch.storage.disk import Disk
from gradwatch.storage.events import encode_event
from gradwatch.storage.recorder import Recorder
from gradwatch.storage.store import Store

#: Up to how many bytes of rows wait for a disk that cannot follow.
MAX_WAITING = 32 << 20
#: Of MAX_WAITING so much is taken: one step in so many is kept. From the fullest; below the last all are.
THINNING = ((0.75, 100), (0.5, 10))


class RunWriter:
    """Writes one run directory.

    Nothing is raised after construction, nothing waits for the disk. When the disk is full, broken or too slow, steps
    wait in memory, up to 32 MiB; once half of that is taken only every 10th step is kept, from three quarters on every
    100th, and none when it is full. A step whose global norm is not finite is kept as long as there is room. What was
    left out is counted in `dropped_steps` and marked in the events. A forked child writes nothing.

    Args:
        path: The run directory.
        info: Facts of the run; host, process, times and status are filled in.
        overwrite: Delete the run that is there.
        resume: Go on with the run that is there, after its last step; a number is the first step that will be written,
            and supersedes what was recorded from there on. So does any step that was recorded already.
        flush_every: At most so many steps are lost when the process is killed...
        flush_seconds: ...or those of so many seconds.

    Attributes:
        path: The run directory.
        next_step: Where a resumed run goes on: the step after the last recorded one.
        dropped_steps: Steps that were handed over and are not in the record.

    Raises:
        RunExistsError: When there is a run and neither `overwrite` nor `resume` is set.
        RunFormatError: When the directory holds something else, or a run of a newer version.
        RunLockedError: When another writer is alive; names its process.
        ConfigurationError: When two parameters have one name, or a setting is nonsense.

    Examples:
        >>> import tempfile
        >>> from gradwatch.records import Parameter
        >>> parameters = (Parameter("fc.weight"),)
        >>> writer = RunWriter(tempfile.mkdtemp() + "/run", RunInfo(parameters))
        >>> writer.write(StepBatch(parameters, np.array([0]), np.array([[0.5]], np.float32), {"loss": np.array([0.7])}))
        >>> writer.close()
    """

    #: What touches the files; a test puts in one that fails.
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
        _check(info, overwrite=overwrite, resume=resume, flush_every=flush_every, flush_seconds=flush_seconds)
        self.path = Path(path)
        self._pid = os.getpid()
        now = time.time()
        begun = {
            "status": "running",
            "status_detail": "",
            "ended": None,
            "started": info.started or now,
            "heartbeat": now,
        }
        process = {"host": info.host or socket.gethostname(), "pid": self._pid}
        info = dataclasses.replace(info, **begun, **process)  # type: ignore[arg-type]
        # Woken at half of what may be lost, the thread has the time of as many steps for the flush itself.
        self._flush_at = max(1, flush_every // 2)
        self._bytes_written = self._dropped_steps = self._failures = 0
        self._recorder: Recorder | None = None
        store = Store(self.path, info, overwrite=overwrite, resume=resume, disk=self.disk_type())
        try:
            self.next_step = store.next_step
            self._recorder = Recorder(store, flush_seconds)
            self._recorder.start()
            self._finalizer = weakref.finalize(self, _abandon, self._recorder, self._pid)
        except BaseException:
            if self._recorder is not None:
                self._recorder.close("crashed", "could not begin")
            else:
                store.release()
            raise

    def write(self, batch: StepBatch) -> None:
        """Hand over steps, in a few microseconds; the arrays belong to the writer from now on.

        Args:
            batch: Steps in ascending order. Those that are not beyond the last ones supersede what was recorded.
        """
        recorder = self._recorder
        if recorder is None or os.getpid() != self._pid:
            return
        waiting = recorder.waiting_bytes
        if waiting > THINNING[-1][0] * MAX_WAITING:
            batch = _thinned(recorder, batch, waiting / MAX_WAITING)
        if not len(batch.step):
            return
        recorder.put(batch)
        if recorder.waiting_steps >= self._flush_at and not recorder.wake.is_set():
            recorder.wake.set()

    def ask_when_idle(self, tell: Callable[[Callable[[StepBatch], object]], object]) -> None:
        """Let the writing thread ask for steps whenever `flush_seconds` have passed without any.

        Args:
            tell: Called on that thread, with what takes steps that were not handed over yet; nobody may `write` while
                it does.
        """
        if self._recorder is not None:
            self._recorder.more = partial(tell, self._recorder.put)

    def event(self, kind: str, data: Mapping[str, Any], *, sync: bool = False) -> None:
        """Add a line to the events.

        Args:
            kind: `finding`, `action`, `alert` or `mark`.
            data: JSON types.
            sync: Bring it to disk and past a power cut at once (critical findings); this does not wait for it either.
        """
        recorder = self._recorder
        if recorder is None or os.getpid() != self._pid:
            return
        recorder.events.append((encode_event(kind, data), sync))
        if sync:
            recorder.wake.set()

    def update_info(self, **changes: Any) -> None:
        """Replace fields of the `RunInfo` in run.json, within moments.

        Raises:
            ConfigurationError: For a field that there is not.
        """
        unknown = changes.keys() - {field.name for field in dataclasses.fields(RunInfo)}
        if unknown:
            raise ConfigurationError(f"RunInfo has no field {', '.join(sorted(unknown))}")
        recorder = self._recorder
        if recorder is not None and os.getpid() == self._pid:
            recorder.change(changes)

    def close(self, status: str = "finished", detail: str = "") -> None:
        """Write everything, seal the last segment, let the lock go; a second call does nothing.

        Args:
            status: `finished` or `crashed`.
            detail: Why it crashed.
        """
        recorder = self._recorder
        if recorder is None or os.getpid() != self._pid:
            return
        recorder.close(status, detail)
        self._finalizer.detach()
        self._bytes_written, self._dropped_steps, self._failures = self.bytes_written, self.dropped_steps, self.failures
        self._recorder = None

    @property
    def bytes_written(self) -> int:
        """Bytes brought to disk by this process so far."""
        store = self._recorder.store if self._recorder else None
        return store.bytes_written + store.bytes_sealed if store else self._bytes_written

    @property
    def failures(self) -> int:
        """How often something failed in the threads that write; they try again."""
        return self._recorder.failures if self._recorder else self._failures

    @property
    def dropped_steps(self) -> int:
        """Steps that were handed over and will not be in the record."""
        return self._recorder.thinned_steps + self._recorder.lost_steps if self._recorder else self._dropped_steps


class NoWriter(RunWriter):
    """Takes what a `RunWriter` takes and writes nothing: another process writes the record of this training.

    Args:
        path: The run directory, which is not touched.
        info: Facts of the run.
        settings: As for `RunWriter`.
    """

    def __init__(self, path: str | os.PathLike[str], info: RunInfo, **settings: Any) -> None:
        _check(info, **settings)
        self.path, self.next_step = Path(path), 0
        self._pid, self._recorder = os.getpid(), None
        self._bytes_written = self._dropped_steps = self._failures = 0


def _abandon(recorder: Recorder, pid: int) -> None:
    """At the end of the interpreter, or of a writer that nobody holds any more."""
    if os.getpid() == pid:
        recorder.close("crashed", "the writer was not closed")


def _thinned(recorder: Recorder, batch: StepBatch, fill: float) -> StepBatch:
    """What is kept of the batch while the disk cannot follow."""
    if fill >= 1:
        rows = np.empty(0, np.int64)
    else:
        stride = next(stride for share, stride in THINNING if fill > share)
        norm = batch.metric("global_norm")
        rows = np.flatnonzero((batch.step % stride == 0) | ~(np.isfinite(norm) | (norm == NOT_MEASURED)))
    dropped = len(batch.step) - len(rows)
    if not dropped:
        return batch
    if recorder.thinned_last < recorder.thinned_first or recorder.thinned_first < 0:
        recorder.thinned_first = int(batch.step[0])
    recorder.thinned_last = int(batch.step[-1])
    recorder.thinned_steps += dropped
    return select(batch, rows)


def _check(info: RunInfo, *, overwrite: bool, resume: bool | int, flush_every: int, flush_seconds: float) -> None:
    if flush_every < 1:
        raise ConfigurationError.of("flush_every", ">= 1", flush_every)
    if not flush_seconds > 0:
        raise ConfigurationError.of("flush_seconds", "> 0", flush_seconds)
    if overwrite and resume is not False:
        raise ConfigurationError("'overwrite' and 'resume' exclude each other")
    if resume is not False and resume < 0:
        raise ConfigurationError.of("resume", "a bool or a step >= 0", resume)
    seen: set[str] = set()
    for parameter in info.parameters:
        if parameter.name in seen:
            raise ConfigurationError(f"two parameters have the name {parameter.name!r}")
        seen.add(parameter.name)
