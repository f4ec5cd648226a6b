"""Reading the files of a run, from a local directory or from anywhere pyarrow or fsspec can read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from gradwatch.errors import MissingDependencyError, RunFormatError, RunNotFoundError
from gradwatch.redaction import without_credentials
from gradwatch.storage.layout import LOCK_FILE
from gradwatch.storage.lock import is_locked

#: Files that are read whole may not be larger; an events file of a million findings is smaller.
_LARGEST = 1 << 31


class Files(Protocol):
    """The files below one run directory, by their paths relative to it; symbolic links are not followed."""

    def listing(self, folder: str) -> dict[str, int]:
        """Names of the plain files in a folder and their sizes; empty when there is no such folder."""

    def read(self, path: str, offset: int = 0) -> bytes:
        """The bytes of a file from `offset` on; FileNotFoundError when it is not there."""

    def open(self, path: str) -> Any:
        """A context that yields the file for pyarrow."""

    def is_locked(self) -> bool | None:
        """Whether a writer is alive; None when that cannot be told from here."""


class LocalFiles(Files):
    """A directory of this machine.

    Args:
        root: The run directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def listing(self, folder: str) -> dict[str, int]:
        place = self.root / folder
        if folder and place.is_symlink():
            return {}
        found = {}
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    try:
                        if entry.is_file(follow_symlinks=False):
                            found[entry.name] = entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:  # sealed and removed while we look
                        continue
        except (FileNotFoundError, NotADirectoryError):
            pass
        return found

    def read(self, path: str, offset: int = 0) -> bytes:
        with self._plain(path).open("rb") as file:
            file.seek(offset)
            # Not more than there is: `read` asks for the memory before it reads.
            return file.read(max(0, min(os.fstat(file.fileno()).st_size - offset, _LARGEST)))

    @contextmanager
    def open(self, path: str) -> Iterator[Any]:
        with pa.OSFile(os.fspath(self._plain(path))) as file:
            yield file

    def is_locked(self) -> bool | None:
        return is_locked(self.root / LOCK_FILE)

    def _plain(self, path: str) -> Path:
        place = self.root / path
        if not stat.S_ISREG(place.lstat().st_mode):
            raise RunFormatError(f"{place} is not a plain file")
        if place.parent != self.root and place.parent.is_symlink():
            raise RunFormatError(f"{place.parent} is a symbolic link, which gradwatch does not follow")
        return place


class RemoteFiles(Files):
    """A directory behind a URL.

    Args:
        url: Such as `s3://bucket/runs/mnist` or `memory://runs/mnist`.
    """

    def __init__(self, url: str) -> None:
        self._system, self._root = _file_system(url)

    def listing(self, folder: str) -> dict[str, int]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(f"{self._root}/{folder}".rstrip("/"), allow_not_found=True)
        infos = self._system.get_file_info(selector)
        return {info.base_name: info.size for info in infos if info.type == FileType.File}

    def read(self, path: str, offset: int = 0) -> bytes:
        with self.open(path) as file:
            file.seek(offset)
            return bytes(file.read(max(0, min(file.size() - offset, _LARGEST))))

    def open(self, path: str) -> Any:
        return self._system.open_input_file(f"{self._root}/{path}")

    def is_locked(self) -> bool | None:
        return None


def _file_system(url: str) -> tuple[Any, str]:
    from pyarrow import fs

    shown = without_credentials(url)
    try:
        system, root = fs.FileSystem.from_uri(url)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        try:
            import fsspec
        except ImportError as error:
            raise MissingDependencyError(f"'fsspec' is needed to read {shown}: pip install fsspec") from error
        try:
            remote, root = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise RunNotFoundError(without_credentials(f"{url}: {error}")) from error
        except ImportError as error:
            raise MissingDependencyError(f"{shown}: {error}") from error
        system = fs.PyFileSystem(fs.FSSpecHandler(remote))
    return system, root.rstrip("/")


def files_at(path: str | os.PathLike[str]) -> Files:
    """The files of the run at a path or URL."""
    text = os.fspath(path)
    return RemoteFiles(text) if "://" in text else LocalFiles(Path(text))
