"""`gradwatch.watch` for Keras models: custom loops, and `train_on_batch`.

A loop of the user's own calls an optimizer; the watcher sits on that call until it is closed. Where the call is made
from Python at every step, each step is recorded at once. Inside a `tf.function` Python runs only while it is traced:
rows wait in a ring on the device until `watcher.log(...)` or `watcher.close()` fetches them. A function that JAX
compiles gives out what it returns and nothing else, so its loop hands a state through, see
`KerasLoopWatcher.stateless_apply`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Unpack

import keras

from gradwatch.actions.base import Due
from gradwatch.backends.keras_actions import KerasActions
from gradwatch.backends.keras_model import Columns, optimizers_of
from gradwatch.backends.keras_tap import Tap
from gradwatch.errors import ModelError
from gradwatch.integrations.keras_instrument import tap_for
from gradwatch.integrations.keras_session import Session
from gradwatch.integrations.keras_watcher import KerasWatcher, rule_of, scales_lr
from gradwatch.settings import Options, settings_from

#: Steps inside a `tf.function` that the device keeps for the next `log`.
RING_ROWS = 4096


class KerasLoopWatcher(KerasWatcher):
    """Watches a Keras model in a loop of the user's own; made by `gradwatch.watch`.

    Args:
        model: A built Keras model.
        optimizers: The optimizers that the loop calls.
        settings: Keyword arguments of `gradwatch.settings.Settings`.
    """

    def __init__(self, model: keras.Model, optimizers: Sequence[Any], **settings: Unpack[Options]) -> None:
        self._attached = ExitStack()
        super().__init__(Columns(model, optimizers), **settings)
        self._model, self._optimizers = model, list(optimizers)
        self._tap = self._make_tap()
        run_dir = self.run_dir
        self._actions = KerasActions(model, self._columns, optimizers=optimizers, actions=self.between, run_dir=run_dir)
        eagerly = getattr(self._tap, "eagerly", None)
        sits = eagerly(optimizers) if eagerly else self._tap.attached(model, self._optimizers)
        self._attached.enter_context(sits)

    def _make_tap(self) -> Tap:
        tap = tap_for(rule_of(self._policy), scaled=scales_lr(self.between), rows=RING_ROWS, prepare=lambda: None)
        tap.faults = self.faults
        tap.start(self._columns, self._optimizers)
        tap.on_step = self._before_step
        return tap

    def _before_step(self, number: int) -> None:
        self.faults.call("keras host", self._look, number, default=None)

    def _look(self, number: int) -> None:
        self._take()
        if self.has_stepped(number):
            self._act(self.settle())
            if self.decides_between_steps:
                self._actions.watch_over(self.coming_step, None, is_well=self.is_well)

    def _act(self, dues: Sequence[Due]) -> None:
        for due in dues:
            self.act(due, self._actions, self._tap)

    def log(self, **numbers: Any) -> None:
        """Add numbers to the record of the step before; inside a `tf.function` loop also the moment to look at it.

        Raises:
            StopTraining: A `Stop` is due.
        """
        super().log(**numbers)

    def _log(self, numbers: Mapping[str, Any]) -> None:
        self.faults.call("keras host", self._take, default=None)
        super()._log(numbers)
        self.faults.call("keras host", lambda: self._act(self.settle(keep=1)), default=None)

    def _take(self) -> None:
        self.take_in_order(self._tap.drain())

    def initial_state(self) -> dict[str, Any]:
        """On JAX: what `stateless_apply` takes at the first step."""
        found: dict[str, Any] = self._jax_tap().loop_state()
        return found

    def stateless_apply(
        self, optimizer: Any, optimizer_variables: Any, grads: Any, trainable_variables: Any, *, state: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """On JAX: `optimizer.stateless_apply`, watched; pure, so that it can be compiled.

        Args:
            optimizer: One of those watched.
            optimizer_variables: As for `optimizer.stateless_apply`.
            grads: As for `optimizer.stateless_apply`.
            trainable_variables: As for `optimizer.stateless_apply`.
            state: From `initial_state` or `took`.

        Returns:
            New trainable variables, new optimizer variables, and the state to hand to `took` outside.
        """
        tap = self._jax_tap()
        with tap.lent(state) as lent, tap.attached(self._model, self._optimizers):
            trainable, held = optimizer.stateless_apply(optimizer_variables, grads, trainable_variables)
        return trainable, held, lent()

    def took(self, state: dict[str, Any], **numbers: Any) -> dict[str, Any]:
        """On JAX: after each step, outside of what is compiled.

        Args:
            state: From `stateless_apply`.
            numbers: As for `log`.

        Returns:
            The state for the next step.
        """
        self._require_open()
        self._jax_tap().keep(state)
        self._actions.are_weights_here = False
        self.log(**numbers)
        following: dict[str, Any] = self._jax_tap().loop_state(state)
        return following

    def _jax_tap(self) -> Any:
        if not hasattr(self._tap, "loop_state"):
            raise ModelError("only the JAX backend has stateless loops; call the optimizer as usual")
        return self._tap

    def close(self, status: str = "finished", detail: str = "") -> None:
        """See `Watcher.close`."""
        if self._closed:
            return
        self._attached.close()
        self.faults.call("keras host", self._take, default=None)
        self.finish()
        self._tap.set_lr_factor(1.0)
        super().close(status, detail)
        self._actions.close()


def watch_keras(model: keras.Model, optimizer: Any = None, **settings: Unpack[Options]) -> KerasWatcher:
    """See `gradwatch.watch`.

    With an optimizer, a loop of the user's own that calls it; without, a compiled model's `train_on_batch`. For `fit`
    there is the callback `GradWatch`.
    """
    if optimizer is None:
        if not model.compiled:
            raise ModelError(f"{type(model).__name__} {model.name!r} is not compiled: name the optimizer to watch")
        Columns(model, optimizers_of(model))
        session = Session(model, settings_from(settings))
        assert session.watcher is not None
        session.watcher.on_close = session.release
        return session.watcher
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for each in optimizers:
        if not isinstance(each, keras.optimizers.Optimizer):
            raise ModelError(f"'optimizer' must be a keras.optimizers.Optimizer or a list of them: {each!r}")
        if not each.built:
            each.build(model.trainable_variables)
    return KerasLoopWatcher(model, optimizers, **settings)
