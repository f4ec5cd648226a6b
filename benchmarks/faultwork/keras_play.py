"""Plays a `fit` of Keras, on the backend that `KERAS_BACKEND` names, watched by the callback or not."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path
from typing import Any

import keras
import numpy as np

import gradwatch as gw
from benchmarks.faultwork.campaign import Stage
from benchmarks.faultwork.play import Loop, Played, Traces, hurried, listening, settings
from benchmarks.faultwork.sites import Moment
from gradwatch.integrations.keras import GradWatch

EPOCHS, BATCHES, BATCH = 3, 4, 8

#: What the callback is told besides what every play is.
SCENES: dict[str, dict[str, Any]] = {
    "watched": {"stats_every": 3},
    "armed": {"actions": [gw.Clip(max_norm=1e9), gw.SkipStep(), gw.Rollback(every=4), gw.DecayLR(), gw.Stop()]},
}


class _Clock(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Tells the moment, and keeps the state at the end of each epoch, when all backends have it in the variables."""

    def __init__(self, moment: Moment, played: Played) -> None:
        super().__init__()
        self._moment, self._played = moment, played

    def on_train_begin(self, logs: Any = None) -> None:
        self._moment.now, self._played.has_begun = "watch", False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._moment.now, self._played.has_begun = "steady" if epoch else "first", True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        now, self._moment.now = self._moment.now, ""
        self._played.digests.append(digest(self._model))
        self._moment.now = now

    def on_train_end(self, logs: Any = None) -> None:
        self._moment.now = "close"


def digest(model: keras.Model) -> str:
    """Of the bytes of all weights and of the optimizer's variables."""
    found = hashlib.sha256()
    for variable in [*model.weights, *model.optimizer.variables]:
        found.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    return found.hexdigest()


def built() -> keras.Model:
    """A small model, alike each time."""
    keras.utils.set_random_seed(1)
    hidden = keras.layers.Dense(8, activation="relu")
    model = keras.Sequential([keras.Input((6,)), hidden, keras.layers.Dropout(0.25), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model: keras.Model, moment: Moment, played: Played, *callbacks: Any) -> None:
    """Train it; its state is kept at first and after each epoch."""
    rows = np.random.default_rng(0).normal(size=(BATCHES * BATCH, 7)).astype(np.float32)
    played.digests.append(digest(model))
    own = [_Clock(moment, played), *callbacks]
    try:
        model.fit(rows[:, :6], rows[:, 6], batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=own)
    finally:
        moment.now = ""


class KerasStage(Stage):
    """Plays injections in `fit`."""

    def __init__(self) -> None:
        super().__init__(())
        unwatched = Played()
        fit(built(), Moment(), unwatched)
        self.plain = dict.fromkeys(SCENES, unwatched.digests)
        self.clean = {name: self._clean(name) for name in SCENES}

    def play(self, scene: str, run_dir: Path, loop: Loop) -> Played:
        """Play a scene, watched."""
        played, before = Played(), Traces()
        with hurried(), listening(played.logged):
            reference = self._fit(scene, run_dir, played)
            loop.over.set()
            keras.backend.clear_session()
            played.leaks += before.left(run_dir, reference)
        played.is_blocked = loop.was_blocked
        return played

    def _fit(self, scene: str, run_dir: Path, played: Played) -> Any:
        watch, model = GradWatch(run_dir=run_dir, **settings(played.heard), **SCENES[scene]), built()
        try:
            fit(model, self.moment, played, watch)
        except BaseException as error:  # noqa: BLE001 -- whatever comes out is what we look for
            played.error = error.with_traceback(None)
            played.error.__context__ = None
            played.digests.append(digest(model))
        watcher = watch.watcher
        if watcher is None:
            return None
        watcher.close()
        overhead = watcher.overhead()
        played.failures, played.dropped = dict(overhead["failures"]), int(overhead["dropped_steps"])
        if not isinstance(played.error, KeyboardInterrupt):  # of a `fit` that is interrupted Keras tells no callback
            parts = (model, model.optimizer)
            played.leaks += [f"{key} of {type(part).__name__}" for part in parts for key in _ours(part)]
        return weakref.ref(watcher)


def _ours(part: Any) -> list[str]:
    """Attributes that gradwatch has put on a part of the model."""
    kept = {key: value for key, value in vars(part).items() if callable(value)}
    return [key for key, value in kept.items() if (getattr(value, "__module__", None) or "").startswith("gradwatch")]
