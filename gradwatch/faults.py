"""Keeps gradwatch's own failures out of the training: logged once, counted, and the failing part switched off."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from gradwatch.errors import StopTraining

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
            self.note(part, error)
            return default

    def note(self, part: str, error: BaseException) -> None:
        """Count a failure; the first of a part is logged with its traceback."""
        with self._lock:
            first = part not in self.counts
            self.counts[part] = self.counts.get(part, 0) + 1
            self.messages.setdefault(part, f"{type(error).__name__}: {error}")
        if first:
            logger.error(
                "gradwatch: '%s' failed and is switched off; training goes on",
                part,
                exc_info=(type(error), error, error.__traceback__),
            )
