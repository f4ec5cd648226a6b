"""New weights for layers of a Keras model: by their own initializers, or by the activation that follows."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from gradwatch.backends.keras_values import Array
from gradwatch.records import Parameter

#: Activations for which He's variance 2 / fan_in is made (He et al. 2015, Delving deep into rectifiers, section 2.2).
_RECTIFIERS = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "SELU", "GELU", "SiLU", "Mish", "CELU", "Hardswish")


def fresh_value(variable: Any, parameter: Parameter, owner: Any, *, scheme: str, rng: np.random.Generator) -> Array:
    """A new value for one variable.

    Args:
        variable: The variable.
        parameter: Its description.
        owner: The layer that owns it.
        scheme: `default` for the layer's own initializer; `kaiming`, `xavier`, `orthogonal`; else by activation.
        rng: Source of seeds.
    """
    seed = int(rng.integers(2**31))
    own = _own_initializer(owner, variable.name, seed)
    initializer = own if scheme == "default" else _by_scheme(variable, parameter, scheme, seed) or own
    if initializer is None:
        initializer = keras.initializers.GlorotUniform(seed=seed) if len(variable.shape) > 1 else "zeros"
    value = keras.initializers.get(initializer)(tuple(variable.shape), dtype="float32")
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _by_scheme(variable: Any, parameter: Parameter, scheme: str, seed: int) -> Any:
    """None for what is no matrix of weights: biases, scales and embeddings keep their own."""
    if len(variable.shape) < 2 or "kernel" not in variable.name or min(variable.shape) == 0:
        return None
    if scheme == "orthogonal" or variable.name.startswith("recurrent"):
        return keras.initializers.Orthogonal(seed=seed)
    if scheme == "kaiming" or (scheme != "xavier" and parameter.activation in _RECTIFIERS):
        return keras.initializers.HeNormal(seed=seed)
    return keras.initializers.GlorotUniform(seed=seed)


def _own_initializer(owner: Any, name: str, seed: int) -> Any:
    """The initializer that the layer was made with, with another seed: one with a seed repeats itself."""
    for holder in (owner, getattr(owner, "cell", None)):
        initializer = getattr(holder, f"{name}_initializer", None)
        if isinstance(initializer, keras.initializers.Initializer):
            config = initializer.get_config()
            return type(initializer).from_config({**config, "seed": seed} if "seed" in config else config)
    return None


def owners_of(model: keras.Model) -> dict[int, Any]:
    """The layer that owns each variable, by the variable's id."""
    found: dict[int, Any] = {}
    for layer in [model, *model._flatten_layers(include_self=False, recursive=True)]:
        for variable in getattr(layer, "_trainable_variables", ()):
            found.setdefault(id(variable), layer)
    return found
