"""A train function of a Keras model that measures, made by Keras itself while we sit on the optimizer's entry point.

What is compiled stays with the plain train function, so that a second `fit` compiles nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras

from gradwatch.actions.policy import Policy
from gradwatch.backends.keras_model import Columns, optimizers_of
from gradwatch.backends.keras_rule import Rule
from gradwatch.backends.keras_tap import Tap
from gradwatch.errors import ModelError
from gradwatch.faults import Faults
from gradwatch.integrations.keras_watcher import rule_of, scales_lr

#: Rows that a ring on the device holds at least.
RING_ROWS = 64
_MARK = "_gradwatch_instrument"


class Instrument:
    """A train function that measures, and the tap inside it; lives as long as the plain function it stands for.

    Args:
        model: A compiled model.
        policy: The actions; what of them acts inside the step is compiled in.
    """

    def __init__(self, model: keras.Model, policy: Policy) -> None:
        self.model = model
        #: Called when the model is built and described.
        self.on_ready: Callable[[], None] | None = None
        rows = max(RING_ROWS, 4 * getattr(model, "steps_per_execution", 1))
        rule, scaled = rule_of(policy), scales_lr(policy.between)
        self.tap = tap_for(rule, scaled=scaled, rows=rows, prepare=self.prepare)
        self.function = self._make()

    @classmethod
    def of(cls, model: keras.Model, plain: Callable[..., Any], policy: Policy) -> Instrument:
        """The instrument of a model's train function: the one it has already, if it does the same."""
        key = json.dumps([policy.config(), policy.dry_run], sort_keys=True, default=str)
        known = getattr(plain, _MARK, None)
        if known is None or known[0] != key:
            known = (key, cls(model, policy))
            setattr(plain, _MARK, known)
        instrument: Instrument = known[1]
        return instrument

    def _make(self) -> Any:
        model, before = self.model, self.model.train_function
        stepping = getattr(self.tap, "stepping", None)
        with stepping(model) if stepping else nullcontext():
            try:
                model.train_function = None
                model.make_train_function(force=True)
                return model.train_function
            finally:
                model.train_function = before

    def attached(self) -> AbstractContextManager[None]:
        """Sits on the optimizers until the block ends."""
        return self.tap.attached(self.model, optimizers_of(self.model))

    def prepare(self) -> None:
        """The model is built now: describe it, once."""
        if self.tap.columns is None:
            optimizers = optimizers_of(self.model)
            self.tap.start(Columns(self.model, optimizers), optimizers)
        if self.on_ready is not None:
            self.on_ready()


def tap_for(rule: Rule, *, scaled: bool, rows: int, prepare: Callable[[], None]) -> Tap:
    """The tap of the backend in use.

    Args:
        rule: The in-step actions.
        scaled: Whether the learning rate may be scaled.
        rows: Rows that a ring on the device holds.
        prepare: See `TensorFlowTap`.
    """
    faults, backend = Faults(), keras.backend.backend()
    if backend == "tensorflow":
        from gradwatch.backends.keras_tensorflow import TensorFlowTap

        return TensorFlowTap(rule, scales_lr=scaled, faults=faults, rows=rows, prepare=prepare)
    if backend == "torch":
        from gradwatch.backends.keras_torch import TorchTap

        return TorchTap(rule, scales_lr=scaled, faults=faults)
    if backend == "jax":
        from gradwatch.backends.keras_jax import JaxTap

        return JaxTap(rule, scales_lr=scaled, faults=faults)
    raise ModelError(f"the Keras backend must be tensorflow, torch or jax: {backend!r}")
