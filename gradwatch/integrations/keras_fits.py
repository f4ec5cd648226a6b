"""Whether a `fit` still runs: an exception or Ctrl-C ends it without a word to its callbacks."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import keras


class Fit:
    """The `fit` that calls a callback at this moment."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        #: What it holds until it ends, and an exception's traceback after that.
        found = next(filter(None, map(_callbacks, _stack(self._thread))), None)
        self._callbacks = None if found is None else weakref.ref(found)

    @property
    def is_over(self) -> bool:
        """Whether it ended; False where a loop of the user's own calls the callbacks, of which nothing is known."""
        if self._callbacks is None:
            return False
        mine = self._callbacks()
        return mine is None or all(_callbacks(frame) is not mine for frame in _stack(self._thread))


def _stack(thread: int) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread)  # noqa: SLF001 -- the documented way to another thread's frames
    while frame is not None:
        yield frame
        frame = frame.f_back


def _callbacks(frame: FrameType) -> Any:
    found = frame.f_locals.get("callbacks") if frame.f_code.co_name == "fit" else None
    return found if isinstance(found, keras.callbacks.CallbackList) else None
