"""Ends a record when the interpreter ends."""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger("gradwatch")


class Closable(Protocol):
    """What has a record to end."""

    def close(self, status: str = "finished", detail: str = "") -> None:
        """End it."""


def close_at_exit(watcher: Closable) -> Callable[[], None]:
    """Close at interpreter exit, without keeping the watcher alive until then; returns what `atexit` will call."""
    reference = weakref.ref(watcher)

    def close() -> None:
        # The interpreter leaves the exception that ended it here before it runs what was registered with atexit.
        for _ in (1, 2):
            try:
                alive, error = reference(), getattr(sys, "last_value", None)
                if alive is not None:
                    alive.close("crashed", f"{type(error).__name__}: {error}") if error else alive.close()
            except Exception:
                logger.exception("gradwatch: could not end the record at the end of the interpreter; once more")
            else:
                break

    atexit.register(close)
    return close
