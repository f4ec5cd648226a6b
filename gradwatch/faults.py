"""Keeps gradwatch's own failures out of the training: logged once, counted, and the failing part switched off."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from gradwatch.errors import GradwatchError, StopTraining
from gradwatch.redaction import without_credentials

logger = logging.getLogger("gradwatch")
T = TypeVar("T")


class Faults:
    """Runs the parts of gradwatch so that none of them can raise into the training loop.

    A part that fails is switched off; the others go on (law 2). Only `StopTraining` passes through.

    Examples:
        >>> faults = Faults()
        >>> faults.call("detectors", lambda: 1, default=0)
        1
        >>> faults.counts
        {}
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.messages: dict[str, str] = {}
        self._lock = threading.Lock()

    def is_on(self, part: str) -> bool:
        """Whether the part has not failed."""
        return part not in self.counts

    def call(self, part: str, function: Callable[..., T], *args: Any, default: T, **kwargs: Any) -> T:
        """`function(*args, **kwargs)`, or `default` when the part is off or fails now."""
        if part in self.counts:
            return default
        try:
            return function(*args, **kwargs)
        except StopTraining:
            raise
        except Exception as error:  # noqa: BLE001 -- whatever fails here is ours and must not reach the training
            try:
                self.note(part, error)
            except Exception:  # noqa: BLE001 -- short of memory for the call itself
                self.counts[part] = 1
            return default

    def for_user(self, part: str, function: Callable[..., T], *args: Any) -> T | None:
        """As `call`, for what a method of the user's does: what names a misuse of it is raised too."""
        try:
            return None if part in self.counts else function(*args)
        except GradwatchError:
            raise
        except Exception as error:  # noqa: BLE001 -- as in `call`
            self.note(part, error)
            return None

    def let_go(self, part: str, *endings: Callable[[], object]) -> None:
        """Call all of these, whether the part is on or off, and each once more where it fails.

        An interrupt passes through, but only when everything from the interrupted one on has been called again.
        """
        for place, ending in enumerate(endings):
            try:
                if self._fails(part, ending):
                    self._fails(part, ending)
            except BaseException:
                self.let_go(part, *endings[place:])
                raise

    def _fails(self, part: str, ending: Callable[[], object]) -> bool:
        try:
            ending()
        except Exception as error:  # noqa: BLE001 -- as in `call`
            try:
                self.note(part, error)
            except Exception:  # noqa: BLE001 -- as in `call`
                self.counts[part] = 1
            return True
        return False

    def note(self, part: str, error: BaseException) -> None:
        """Count a failure; the first of a part is logged with its traceback. Raises nothing itself."""
        try:
            self._note(part, error)
        except Exception:  # noqa: BLE001 -- there is nobody left to tell
            self.counts.setdefault(part, 1)

    def _note(self, part: str, error: BaseException) -> None:
        with self._lock:
            first = part not in self.counts
            self.counts[part] = self.counts.get(part, 0) + 1
            self.messages.setdefault(part, without_credentials(f"{type(error).__name__}: {error}"))
        if first:
            logger.error(
                "gradwatch: '%s' failed and is switched off; training goes on",
                part,
                exc_info=(type(error), error, error.__traceback__),
            )
