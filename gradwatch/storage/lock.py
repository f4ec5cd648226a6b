"""One writer per run directory: a lock of the operating system, which dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
import weakref
from pathlib import Path

from gradwatch.errors import RunLockedError
from gradwatch.storage.disk import NO_FOLLOW, opened

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

#: How often and how long a writer tries: a reader that looks whether the lock is free holds it for an instant.
_ATTEMPTS, _PAUSE = 10, 0.02
#: Bytes of the lock file that are looked at.
_LONGEST = 4096
_BUSY = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


class Lock:
    """Holds the lock of a run directory until `release` or the death of the process.

    A forked child closes its copy of the file at once: it neither holds the lock nor keeps it alive after its parent.

    Args:
        path: The lock file; created if missing, never deleted (deleting it would let two writers in).

    Raises:
        RunLockedError: When another writer, in this process or any other, holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file = opened(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, "r+b")
        try:
            self._take(path)
            _held.add(self)
        except BaseException:
            self.release()
            raise

    def _take(self, path: Path) -> None:
        for attempt in range(_ATTEMPTS):
            if _try_lock(self._file.fileno(), shared=False):
                break
            if attempt == _ATTEMPTS - 1:
                holder = describe_holder(path)
                raise RunLockedError(
                    f"{path.parent} is being written by {holder}: choose another directory, or stop it"
                )
            time.sleep(_PAUSE)
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, only its holder goes unnamed
            self._file.truncate(0)
            self._file.write(content)

    def release(self) -> None:
        """Let the next writer in; a second call does nothing."""
        self._file.close()


#: Locks of this process, to be let go in a forked child.
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_held):
        with contextlib.suppress(OSError):  # the file is closed all the same
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def describe_holder(path: Path) -> str:
    """Who wrote the lock file last, in words."""
    try:
        with opened(path, os.O_RDONLY | NO_FOLLOW, "rb") as file:
            holder = json.loads(file.read(_LONGEST))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def is_locked(path: Path) -> bool | None:
    """Whether a live writer holds the lock; None when that cannot be told (no lock file, no locks on this system)."""
    try:
        with opened(path, os.O_RDONLY | NO_FOLLOW, "rb") as file:
            return not _try_lock(file.fileno(), shared=True)
    except OSError:
        return None


if sys.platform == "win32":

    def _lock(file: int, *, shared: bool) -> None:
        os.lseek(file, 1 << 20, os.SEEK_SET)  # far beyond the content, which must stay readable for others
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

else:

    def _lock(file: int, *, shared: bool) -> None:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _try_lock(file: int, *, shared: bool) -> bool:
    """Whether the lock could be taken; it goes when the file is closed."""
    try:
        _lock(file, shared=shared)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if shared or error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}:
            raise
    return True
