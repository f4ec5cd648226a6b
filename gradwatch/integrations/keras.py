"""`gradwatch.keras.GradWatch`: one callback for `model.fit`, on every backend of Keras 3.

`fit` reads `model.train_function` at each step, so the callback puts its own there when the training begins and gives
the old one back when it ends.
"""

from __future__ import annotations

import dataclasses
import weakref
from functools import partial
from typing import Any, Unpack

import keras

from gradwatch.actions.policy import Policy
from gradwatch.integrations.keras_fits import Fit
from gradwatch.integrations.keras_session import Session
from gradwatch.integrations.keras_watcher import KerasWatcher
from gradwatch.records import Finding
from gradwatch.settings import Options, settings_from


class GradWatch(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Watches a Keras model while `fit` trains it.

    Records the gradient norm of every variable at every optimizer step, looks for what goes wrong, and applies the
    actions that were asked for. Without actions the training stays bit-identical. The same callback in a second `fit`
    goes on with the same run.

    Args:
        settings: `run_dir`, `actions`, `alerts`, `sinks`, `detectors` and the other fields of
            `gradwatch.settings.Settings`.

    Raises:
        ConfigurationError: A setting breaks a rule.
        ModelError: When `fit` begins: the model cannot be watched.
        RunExistsError: When `fit` begins: there is a run at `run_dir`; say `resume=True` or `overwrite=True`.

    Examples:
        >>> import keras, numpy as np, tempfile
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> watch = GradWatch(run_dir=tempfile.mkdtemp() + "/run")
        >>> _ = model.fit(np.ones((8, 3)), np.ones(8), batch_size=4, verbose=0, callbacks=[watch])
        >>> watch.findings
        []
    """

    def __init__(self, **settings: Unpack[Options]) -> None:
        super().__init__()
        self._settings = settings_from(settings)
        Policy(self._settings.actions)
        self._session: Session | None = None
        self._last: KerasWatcher | None = None
        self._state: dict[str, Any] | None = None
        self._fit: Fit | None = None

    @property
    def watcher(self) -> KerasWatcher | None:
        """The watcher of the fit in progress, or of the last one; None before the first."""
        session = self._session
        return session.watcher if session is not None and session.watcher is not None else self._last

    @property
    def findings(self) -> list[Finding]:
        """All findings so far."""
        return self.watcher.findings if self.watcher is not None else []

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin to watch."""
        settings = self._settings
        for watch in list(_watching):
            watch.end_if_left()
        self._end("crashed", "fit() ended early")
        if self._last is not None:
            settings = dataclasses.replace(settings, run_dir=self._last.run_dir, resume=True, overwrite=False)
        # `self.model` would make the JAX trainer write its whole state back.
        self._session = Session(self._model, settings, watcher_state=self._state, stop=self._stop)
        try:
            self._last = self._session.watcher
            self._fit = Fit()
            _watching.add(self)
        except BaseException:
            self._end("crashed", "could not begin")
            raise

    def end_if_left(self) -> None:
        """End the record of a `fit` that was interrupted and so could not say that it ended."""
        if self._fit is not None and self._fit.is_over:
            self._end("crashed", "fit() ended early")

    def _end(self, status: str = "finished", detail: str = "") -> None:
        session, self._session, self._fit = self._session, None, None
        if session is not None:
            self._last = session.watcher or self._last
            self._state = session.release(status, detail) or self._state
            session.instrument.tap.faults.let_go("close", partial(_watching.discard, self))

    def _stop(self, words: str) -> None:
        self._model.stop_training = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count epochs and batches."""
        if self._session is not None:
            self._session.epoch_began(epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Take validation metrics."""
        if self._session is not None:
            self._last = self._session.watcher or self._last
            self._session.epoch_ended(logs or {})

    def on_train_end(self, logs: Any = None) -> None:
        """Stop watching; the model is as it was."""
        self._end()


#: Those whose session was not ended.
_watching: weakref.WeakSet[GradWatch] = weakref.WeakSet()
