"""A file that only grows, and never by half of what was to be added."""

from __future__ import annotations

import os
from pathlib import Path

from gradwatch.storage.disk import Disk


class AppendFile:
    """A file opened for appending.

    Args:
        disk: What touches it.
        path: Of the file; created if missing.
        size: How many bytes of it are good; what lies beyond is cut off.
    """

    def __init__(self, disk: Disk, path: Path, *, size: int = 0) -> None:
        self._disk, self.path, self.size = disk, path, size
        #: Whether something half-written lies at the end, which could not be taken back yet.
        self.is_torn = False
        self._is_named = False
        self._file = disk.open(path)
        try:
            if os.fstat(self._file.fileno()).st_size != size:
                disk.truncate(self._file.fileno(), size)
        except BaseException:
            self.close()
            raise

    def append(self, data: bytes) -> None:
        """Append all of `data`; OSError when the disk fails, and then none of it, unless the file `is_torn`."""
        if self._file.closed:
            raise OSError(f"{self.path} is closed")
        file = self._file.fileno()
        try:
            if self.is_torn:
                self._disk.truncate(file, self.size)
                self.is_torn = False
            self._disk.append(file, data)
        except BaseException:
            self.is_torn = True
            self._disk.truncate(file, self.size)
            self.is_torn = False
            raise
        self.size += len(data)

    def sync(self) -> None:
        """Make what was appended safe from a power cut."""
        if not self._file.closed:
            self._disk.sync(self._file.fileno())
            if not self._is_named:
                self._disk.sync_folder(self.path.parent)
                self._is_named = True

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()
