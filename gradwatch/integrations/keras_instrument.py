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
from gradwatch.backends.keras_samples import Sampler
from gradwatch.backends.keras_tap import Tap
from gradwatch.errors import ConfigurationError, ModelError
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
        activations: Whether outputs of activations are sampled.

    Raises:
        ConfigurationError: They cannot be in this model.
    """

    def __init__(self, model: keras.Model, policy: Policy, *, activations: bool = False) -> None:
        self.model = model
        #: Called when the model is built and described.
        self.on_ready: Callable[[], None] | None = None
        rows = max(RING_ROWS, 4 * getattr(model, "steps_per_execution", 1))
        rule, scaled = rule_of(policy), scales_lr(policy.between)
        if activations:
            _refuse_activations(model)
        self.sampler = Sampler(model, activations=activations)
        self.tap = tap_for(rule, scaled=scaled, rows=rows, prepare=self.prepare, sampler=self.sampler)
        self.function = self._make()

    @classmethod
    def of(cls, model: keras.Model, plain: Callable[..., Any], policy: Policy, *, activations: bool) -> Instrument:
        """The instrument of a model's train function: the one it has already, if it does the same."""
        key = json.dumps([policy.config(), policy.dry_run, activations], sort_keys=True, default=str)
        known = getattr(plain, _MARK, None)
        if known is None or known[0] != key:
            known = (key, cls(model, policy, activations=activations))
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


def _refuse_activations(model: keras.Model) -> None:
    backend = keras.backend.backend()
    if backend == "torch" and model.jit_compile and not model.run_eagerly:
        raise ConfigurationError("'activations' must be False for a compiled model: torch would compile it anew")
    if backend == "jax" and not type(model).train_step.__module__.startswith("keras."):
        raise ConfigurationError("'activations' must be False for a train_step of your own on JAX")


def tap_for(rule: Rule, *, scaled: bool, rows: int, prepare: Callable[[], None], sampler: Sampler | None = None) -> Tap:
    """The tap of the backend in use.

    Args:
        rule: The in-step actions.
        scaled: Whether the learning rate may be scaled.
        rows: Rows that a ring on the device holds.
        prepare: See `TensorFlowTap`.
        sampler: See `Tap`.
    """
    backend = keras.backend.backend()
    common: dict[str, Any] = {"scales_lr": scaled, "faults": Faults(), "sampler": sampler}
    if backend == "tensorflow":
        from gradwatch.backends.keras_tensorflow import TensorFlowTap

        return TensorFlowTap(rule, rows=rows, prepare=prepare, **common)
    if backend == "torch":
        from gradwatch.backends.keras_torch import TorchTap

        return TorchTap(rule, **common)
    if backend == "jax":
        from gradwatch.backends.keras_jax import JaxTap

        return JaxTap(rule, **common)
    raise ModelError(f"the Keras backend must be tensorflow, torch or jax: {backend!r}")
