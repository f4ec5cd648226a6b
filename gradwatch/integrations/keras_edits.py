"""Applies between-step actions to a Keras training."""

from __future__ import annotations

from typing import Any

import keras

from gradwatch.actions.base import Due
from gradwatch.backends.keras_tap import Tap
from gradwatch.watcher import Watcher


class Edits:
    """What may be changed between two steps.

    Args:
        model: The model in training.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model

    def apply(self, due: Due, state: Any, watcher: Watcher, tap: Tap) -> Any:
        """Apply an action; on JAX to the state of the training, which is returned."""
        if watcher.settings.dry_run:
            return state
        if due.lr_factor is not None:
            tap.set_lr_factor(due.lr_factor)
        if due.action.name == "Stop":
            self._model.stop_training = True
        return state
