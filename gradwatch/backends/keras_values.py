"""Reads and writes variables of a Keras training between two steps, wherever their values are at that moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from gradwatch.backends.keras_rule import base_of

Array = npt.NDArray[Any]


class Values:
    """The values of a model's and its optimizers' variables.

    Inside `fit` on JAX they are not in the variables but in the state that goes from step to step.

    Args:
        model: The model.
        optimizers: Its optimizers.
        state: On JAX inside `fit`: trainable, non-trainable, optimizer's and metrics' values; None elsewhere.
    """

    def __init__(self, model: keras.Model, optimizers: Sequence[Any], state: Any = None) -> None:
        self._optimizers = [optimizer for optimizer in optimizers if optimizer.built]
        self._weights = list(model.variables)
        self.state = state
        self._place: dict[int, tuple[int, int]] = {}
        if state is not None:
            held = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
            for group, variables in enumerate(held):
                for place, variable in enumerate(variables):
                    self._place[id(variable)] = (group, place)

    def read(self, variable: Any) -> Array:
        """A copy of a variable's value."""
        if self.state is not None and id(variable) in self._place:
            group, place = self._place[id(variable)]
            return np.array(self.state[group][place])
        value = variable.value if isinstance(variable, keras.Variable) else variable
        if hasattr(value, "detach"):
            value = value.detach().cpu()
        return np.array(value.numpy() if hasattr(value, "numpy") else value)

    def write(self, variable: Any, value: Array) -> None:
        """Give a variable a value of its shape; on JAX in `state`."""
        if self.state is None or id(variable) not in self._place:
            variable.assign(value)
            return
        import jax

        group, place = self._place[id(variable)]
        values = list(self.state[group])
        old = values[place]
        values[place] = jax.device_put(np.asarray(value, old.dtype), old.sharding)
        self.state = tuple(values if i == group else kept for i, kept in enumerate(self.state))

    def everything(self) -> Iterator[Any]:
        """Weights and optimizer state; without step counts and learning rates, which belong to the schedule."""
        yield from self._weights
        for optimizer in self._optimizers:
            base = base_of(optimizer)
            spared = {id(base._iterations), id(getattr(optimizer, "_iterations", None)), id(base._learning_rate)}
            yield from (variable for variable in optimizer.variables if id(variable) not in spared)

    def forget(self, variables: Sequence[Any]) -> int:
        """Set what the optimizers remember of some variables to what it was at first; how many were found."""
        wanted = {id(variable) for variable in variables}
        found = set()
        for optimizer in self._optimizers:
            base = base_of(optimizer)
            for place, variable in enumerate(base._trainable_variables):
                if id(variable) in wanted:
                    found.add(id(variable))
                    for name, slot in _slots(base, place, variable):
                        fresh = self.read(variable) if "average" in name else np.zeros(tuple(slot.shape))
                        start = base.initial_accumulator_value if hasattr(base, "initial_accumulator_value") else 0.0
                        self.write(slot, fresh + (start if name == "_accumulators" else 0.0))
        return len(found)

    def restart_counts(self) -> None:
        """Let the bias corrections of the optimizers start anew, where no schedule reads their step counts."""
        for optimizer in self._optimizers:
            base = base_of(optimizer)
            if isinstance(base._learning_rate, keras.Variable):
                phase = self.read(base._iterations) % (base.gradient_accumulation_steps or 1)
                self.write(base._iterations, phase)


def _slots(optimizer: Any, place: int, variable: Any) -> Iterator[tuple[str, Any]]:
    """What an optimizer keeps for the variable at this place: its lists with one entry per variable."""
    count = len(optimizer._trainable_variables)
    for name, kept in vars(optimizer).items():
        if name in ("_trainable_variables", "_variables") or not isinstance(kept, (list, tuple)) or len(kept) != count:
            continue
        slot = kept[place]
        if isinstance(slot, keras.Variable) and tuple(slot.shape) == tuple(variable.shape):
            yield name, slot
