"""Finding out what lies at a path before anything is written there."""

from __future__ import annotations

import contextlib
from pathlib import Path

from gradwatch.errors import RunCorruptError, RunFormatError
from gradwatch.storage.disk import Disk
from gradwatch.storage.facts import decode_facts
from gradwatch.storage.files import LocalFiles
from gradwatch.storage.layout import (
    EVENTS_FILE,
    LOCK_FILE,
    ROLLUPS,
    RUN_FILE,
    SAMPLES,
    STEPS,
    TEMPORARY_SUFFIX,
    Stem,
)

FOLDERS = (STEPS, SAMPLES, ROLLUPS)
_OURS = {RUN_FILE, RUN_FILE + TEMPORARY_SUFFIX, EVENTS_FILE, LOCK_FILE, *FOLDERS}


def holds_run(path: Path) -> bool:
    """Whether there is a run at the path; False for nothing, an empty directory, or one that crashed before it began.

    Raises:
        RunFormatError: When there is something else, or a run of a newer version.
    """
    if path.exists() and not path.is_dir():
        raise RunFormatError(f"{path} is a file, not a run directory")
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    files = LocalFiles(path)
    if RUN_FILE in names:
        status = ""
        with contextlib.suppress(RunCorruptError):  # a damaged one can be overwritten, and perhaps resumed
            status = decode_facts(files.read(RUN_FILE), str(path / RUN_FILE)).info.status
        is_empty = not files.listing(STEPS) and not (EVENTS_FILE in names and files.read(EVENTS_FILE))
        return status != "crashed" or not is_empty
    if not names <= _OURS:
        raise RunFormatError(f"{path} holds something else than a run of gradwatch: choose another directory")
    return bool(files.listing(STEPS))


def make_folders(path: Path, disk: Disk) -> None:
    """Create what is missing, and remove what a process left half-written when it died.

    Raises:
        RunFormatError: When a folder is a symbolic link.
    """
    for folder in FOLDERS:
        _refuse_link(path / folder)
        (path / folder).mkdir(exist_ok=True)
        for file in (path / folder).glob("*" + TEMPORARY_SUFFIX):
            disk.remove(file)
    disk.sync_folder(path)
    disk.sync_folder(path.absolute().parent)


def delete_run(path: Path, disk: Disk) -> None:
    """Delete the files of a run: our own, nothing else.

    Raises:
        RunFormatError: When a folder is a symbolic link.
    """
    for folder in FOLDERS:
        _refuse_link(path / folder)
    for name in (RUN_FILE, EVENTS_FILE):
        disk.remove(path / name)
    for folder in FOLDERS:
        for file in (path / folder).glob("*"):
            if Stem.parse(file.name.partition(".")[0]):
                disk.remove(file)


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise RunFormatError(f"{folder} is a symbolic link, which gradwatch does not follow")
