"""What a thread of ours does when the disk, or our own code, fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("gradwatch")

#: Seconds until the first and the longest until the next try after the disk failed.
FIRST_RETRY, LAST_RETRY = 0.5, 30.0


class Trouble:
    """Keeps failures of the disk and of our own code inside the thread: logs the first, tries less and less often.

    Args:
        path: Of the run, for the log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pause = 0.0
        self._until = 0.0
        self._seen: set[str] = set()
        #: Failures so far.
        self.failures = 0

    @property
    def is_over_pause(self) -> bool:
        """Whether the next try is due."""
        return time.monotonic() >= self._until

    def guard(self, part: str, work: Callable[[], object]) -> bool:
        """Whether `work()` went through."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 -- nothing may end this thread
            self.note(part, error)
            return False
        return True

    def note(self, part: str, error: Exception) -> None:
        """Log a failure, the first of its kind since all was well."""
        self.failures += 1
        kind = f"{part}: {type(error).__name__}: {error}"
        if part not in self._seen:
            self._seen.add(part)
            expected = isinstance(error, OSError)
            message = "gradwatch: cannot write to %s (%s); training goes on, and the writer tries again"
            logger.warning(message, self._path, kind, exc_info=None if expected else error)

    def round(self, done: bool) -> None:
        """A round is over: wait longer after each that failed."""
        if done:
            self._pause = 0.0
            self._seen.clear()
        else:
            self._pause = min(LAST_RETRY, 2 * self._pause or FIRST_RETRY)
        self._until = time.monotonic() + self._pause
