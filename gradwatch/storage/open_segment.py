"""The stream that a writer appends to."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from gradwatch.records import StepBatch
from gradwatch.storage.disk import Disk
from gradwatch.storage.layout import Layout
from gradwatch.storage.stream import StreamEncoder


class OpenSegment:
    """An Arrow IPC stream below `steps/` that grows.

    Args:
        disk: What touches the file.
        path: Of the file, which does not exist yet.
        layout: Its columns.

    Raises:
        OSError: When the disk fails, from every method; the file is then as before the call.
    """

    def __init__(self, disk: Disk, path: Path, layout: Layout) -> None:
        self.disk, self.path, self.layout = disk, path, layout
        self._encoder = StreamEncoder(layout)
        self.rows, self.size, self.since = 0, 0, time.monotonic()
        self._file: int | None = disk.open(path)
        try:
            self._write(self._encoder.head)
        except BaseException:
            self.close()
            with contextlib.suppress(OSError):
                disk.remove(path)
            raise

    def append(self, batch: StepBatch) -> int:
        data = self._encoder.encode(batch)
        self._write(data)
        self.rows += len(batch)
        return len(data)

    def _write(self, data: bytes) -> None:
        assert self._file is not None
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
            os.close(file)
