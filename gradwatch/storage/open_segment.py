"""The stream that a writer appends to."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from gradwatch.records import StepBatch
from gradwatch.storage.appending import AppendFile
from gradwatch.storage.disk import Disk
from gradwatch.storage.layout import OPEN_SUFFIX, Layout, Stem
from gradwatch.storage.stream import StreamEncoder


class OpenSegment:
    """An Arrow IPC stream below `steps/`.

    Args:
        disk: What touches the file.
        folder: Where the file is created.
        stem: Its name.
        layout: Its columns.

    Raises:
        OSError: When the disk fails, from every method; then nothing was added.
    """

    def __init__(self, disk: Disk, folder: Path, stem: Stem, layout: Layout) -> None:
        self.stem, self.layout = stem, layout
        path = folder / f"{stem}{OPEN_SUFFIX}"
        self.rows, self.since = 0, time.monotonic()
        self._encoder = StreamEncoder(layout)
        self._file = AppendFile(disk, path)
        try:
            self._file.append(self._encoder.head)
        except BaseException:
            self._file.close()
            with contextlib.suppress(OSError):
                disk.remove(path)
            raise

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._file.size

    def append(self, batch: StepBatch) -> int:
        """Add steps; returns their bytes."""
        data = self._encoder.encode(batch)
        self._file.append(data)
        self.rows += len(batch)
        return len(data)

    def sync(self) -> None:
        """Make the steps so far safe from a power cut."""
        self._file.sync()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()
