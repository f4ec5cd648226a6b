"""Calls hooks so that their failures stay ours, and counts the time they take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gradwatch.backends.torch_device import is_capturing
from gradwatch.errors import StopTraining
from gradwatch.faults import Faults

_PART = "torch hooks"
logger = logging.getLogger("gradwatch")


class Guard:
    """Runs what may not raise into the training; after a failure nothing any more.

    Nor anything while a CUDA graph is captured: a wait or an allocation there would make the capture fail.

    Args:
        faults: Where failures are noted.
        undo: Puts right what a hook that failed may have left half done.

    Attributes:
        seconds: Spent in hooks so far.
    """

    def __init__(self, faults: Faults, undo: Callable[[], None]) -> None:
        self._faults, self._undo = faults, undo
        self.seconds = 0.0
        self._has_told = False

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, or None when it fails or a hook has failed before."""
        if _PART in self._faults.counts:
            return None
        try:
            if is_capturing() and self._pass_over():
                return None
            started = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - started
        except StopTraining:
            raise
        except Exception as error:  # noqa: BLE001 -- whatever fails here is ours and must not reach the training
            self.failed(error)
            return None
        return result

    def failed(self, error: Exception) -> None:
        """Note a failure and undo what was begun. Raises nothing itself."""
        try:
            self._faults.note(_PART, error)
            self._faults.let_go(_PART, self._undo)
        except Exception:  # noqa: BLE001 -- short of memory for the calls themselves
            self._faults.counts[_PART] = 1

    def _pass_over(self) -> bool:
        if not self._has_told:
            self._has_told = True
            logger.warning("gradwatch: a step that is captured into a CUDA graph is not recorded, nor are its replays")
        return True

    def hook(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, guarded."""
        return partial(self, function)
