"""Leaving the interpreter to the training thread."""

from __future__ import annotations

import time

#: How long Python code runs at a stretch, and how long it then lets the training thread have the interpreter (seconds).
_STRETCH, _BREATH = 3e-4, 5e-5


class Breather:
    """Gives the interpreter away every fraction of a millisecond, so that the training thread never waits for long.

    Without it a busy thread keeps the interpreter for a whole switch interval, five milliseconds.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def __call__(self) -> None:
        """Pause if the stretch is over."""
        if time.perf_counter() - self._since > _STRETCH:
            time.sleep(_BREATH)
            self._since = time.perf_counter()
