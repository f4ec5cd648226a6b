"""What sealing does when a stream cannot be read back whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradwatch.reader import RunReader
from gradwatch.records import Parameter, RunInfo, StepBatch
from gradwatch.storage import stream
from gradwatch.storage.store import Store

PARAMETERS = (Parameter("fc.weight"),)


def test_a_stream_that_is_short_of_memory_while_read_is_not_sealed_without_its_steps(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(run_dir, RunInfo(PARAMETERS))
    store.append(StepBatch(PARAMETERS, np.arange(3), np.ones((3, 1), np.float32), {"loss": np.ones(3)}))
    store.end_segment()

    def short_of_memory(_: object) -> int:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(stream, "checksum", short_of_memory)
        with pytest.raises(OSError, match="0 of 3 steps could be read"):
            store.seal()
    store.finish("finished")
    store.release()

    assert RunReader(run_dir).steps.tolist() == [0, 1, 2]


def test_a_record_batch_that_fails_half_way_leaves_nothing_before_the_next(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(run_dir, RunInfo(PARAMETERS))
    batches = [
        StepBatch(PARAMETERS, np.array([k]), np.ones((1, 1), np.float32), {"loss": np.ones(1)}) for k in range(3)
    ]
    store.append(batches[0])

    def torn(self: stream._Collector, data: bytes) -> int:
        self._take(bytes(data)[:8])
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(stream._Collector, "write", torn)
        with pytest.raises(MemoryError):
            store.append(batches[1])
    for batch in batches[1:]:
        store.append(batch)
    store.finish("finished")
    store.release()

    assert RunReader(run_dir).steps.tolist() == [0, 1, 2]
