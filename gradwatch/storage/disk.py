"""The few operations on files that a writer needs, in one place, so that a test can make each of them fail."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from gradwatch.storage.layout import TEMPORARY_SUFFIX

#: A link is not followed, and a named pipe in the place of a file is not waited for.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def opened(path: Path, flags: int, mode: str) -> io.FileIO:
    """An open file that closes itself where nobody holds it: an interrupt may come before anybody does.

    Args:
        path: Of the file.
        flags: Of `os.open`.
        mode: Of `open`, saying the same.
    """
    # One call, so that there is no moment at which the descriptor is a mere number.
    return next(map(io.FileIO, map(os.open, (path,), (flags | _BINARY,), (0o644,)), (mode,)))


class Disk:
    """Appends to files and replaces files as a whole."""

    def open(self, path: Path) -> io.FileIO:
        """Open for `append`, creating the file if missing; OSError for a symbolic link or a named pipe."""
        return opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW, "ab")

    def append(self, file: int, data: bytes) -> None:
        """Append all of `data`, or raise OSError; then part of it may be there."""
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]

    def truncate(self, file: int, size: int) -> None:
        """Take back what an append that failed has left."""
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        """Return when the content is safe from a power cut."""
        os.fsync(file)

    def replace(self, path: Path, data: Any) -> None:
        """Put a file with the content `data` in the place of `path` at once, safe from a power cut.

        At any moment there is the old content or the new; both are whole.
        """
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:  # never through a link that lies there
                file.write(memoryview(data))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self.sync_folder(path.parent)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder survive a power cut, where the system can."""
        if not hasattr(os, "O_DIRECTORY"):  # Windows keeps a journal of names of its own
            return
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def rename(self, path: Path, new: Path) -> None:
        """Give a file another name in the same folder."""
        path.replace(new)

    def remove(self, path: Path) -> None:
        """Remove a file; none there is fine."""
        path.unlink(missing_ok=True)
