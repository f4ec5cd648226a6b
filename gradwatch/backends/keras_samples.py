"""What a Keras step measures every few steps only: extremes of the gradients, and outputs of activations.

Written once for every backend; the backend asks for it under a condition inside its step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from gradwatch.backends.keras_model import activation_of
from gradwatch.backends.keras_rule import Gradients
from gradwatch.records import MODULE_STATISTICS, NOT_MEASURED, Floats

Tensor = Any
#: Outputs beyond which a bounded activation is flat: its derivative is below 1 % of the largest.
SATURATION = {
    "Sigmoid": (0.0025, 0.9975), "Tanh": (-0.995, 0.995), "Hardtanh": (-0.995, 0.995), "Softsign": (-0.9, 0.9),
}  # fmt: skip
RELU_FAMILY = ("ReLU", "ReLU6")
ACTIVATIONS = (*SATURATION, *RELU_FAMILY, "LeakyReLU", "PReLU", "GELU", "ELU", "SELU", "SiLU")
EXTREMES = ("grad_max", "zero_fraction", "nonfinite_count")
#: Weights copied at once to measure an update; of a larger model each sample measures another part.
MOST_COPIED = 1 << 26
#: The gradient of an output is not within reach of a layer's call.
OUTPUTS = MODULE_STATISTICS[:4]


class Sampler:
    """Measures a sampled step into one vector, which the host takes apart again.

    Args:
        model: The model; it need not be built yet.
        activations: Whether outputs of activations are measured too.
    """

    def __init__(self, model: keras.Model, *, activations: bool = False) -> None:
        self.layers = _activation_layers(model) if activations else []
        self._seen = threading.local()  # each replica of a TensorFlow strategy is traced in a thread of its own

    @property
    def modules(self) -> list[str]:
        """Names of the layers whose outputs are measured; of a built model."""
        names = [getattr(layer, "path", None) or layer.name for layer in self.layers]
        return [name if names.count(name) == 1 else f"{name}:{place}" for place, name in enumerate(names)]

    @property
    def outputs(self) -> dict[int, Tensor]:
        """Place of a layer to its first output in the step at hand."""
        if not hasattr(self._seen, "outputs"):
            self._seen.outputs = {}
        found: dict[int, Tensor] = self._seen.outputs
        return found

    @outputs.setter
    def outputs(self, found: dict[int, Tensor]) -> None:
        self._seen.outputs = found

    def replacements(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        """Layers, and what stands in for their `call`: it notes the output."""
        for place, layer in enumerate(self.layers):
            yield layer, "call", self._call(place, layer.call)

    def _call(self, place: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.outputs.setdefault(place, output)
            return output

        return call

    def size(self, width: int) -> int:
        """Length of the vector for so many columns."""
        return len(EXTREMES) * width + len(OUTPUTS) * len(self.layers)

    def measure(
        self,
        gradients: Gradients,
        values: Sequence[Tensor],
        sizes: Sequence[int],
        outputs: dict[int, Tensor],
        *,
        xp: Any = ops,
        extremes: Tensor | None = None,
    ) -> Tensor:
        """The vector of a step.

        Args:
            gradients: For their columns and factor.
            values: Their entries, dense; those of a sparse one that are not zero.
            sizes: Number of elements of each column's variable.
            outputs: As from `outputs`.
            xp: numpy, where all of these are arrays of numpy; else `keras.ops`.
            extremes: `EXTREMES` column by column, where the backend has measured them by itself.
        """
        found: list[Tensor] = [np.full(3, NOT_MEASURED, np.float32)] * len(sizes)
        if extremes is not None:
            found = [extremes]
        else:
            for column, entries in zip(gradients.columns, values, strict=True):
                found[column] = _extremes(entries, sizes[column], gradients.factor, xp)
        nothing = np.full(len(OUTPUTS), NOT_MEASURED, np.float32)
        for place, layer in enumerate(self.layers):
            found.append(output_statistics(outputs[place], layer, xp) if place in outputs else nothing)
        return xp.concatenate(found if xp is np else [ops.convert_to_tensor(part) for part in found])

    def taken_apart(self, vector: Floats, width: int) -> dict[str, Floats]:
        """Names of statistics to arrays of shape (width,) or (modules,)."""
        vector = np.where(np.isnan(vector), np.float32(NOT_MEASURED), vector)
        extremes = vector[: len(EXTREMES) * width].reshape(width, len(EXTREMES)).T
        outputs = vector[len(EXTREMES) * width :].reshape(len(self.layers), len(OUTPUTS)).T
        named = dict(zip(EXTREMES, extremes, strict=True))
        return named | (dict(zip(OUTPUTS, outputs, strict=True)) if self.layers else {})


def parts(sizes: Sequence[int]) -> list[list[int]]:
    """Places of weights of these sizes, in parts of at most `MOST_COPIED` elements or one weight.

    Examples:
        >>> parts([5, MOST_COPIED, 7, 8])
        [[0], [1], [2, 3]]
    """
    found: list[list[int]] = [[]]
    total = 0
    for place, size in enumerate(sizes):
        if found[-1] and total + size > MOST_COPIED:
            found.append([])
            total = 0
        found[-1].append(place)
        total += size
    return found


def _extremes(entries: Tensor, size: int, factor: Tensor | float, xp: Any) -> Tensor:
    """Largest finite magnitude, share of exact zeros, number of entries that are not finite."""
    line = _single(entries, xp)
    finite = xp.isfinite(line)
    largest = xp.max(xp.where(finite, xp.abs(line), 0.0)) * factor
    filled = xp.sum(_single(line != 0, xp))
    return _row(largest, (size - filled) / size, xp.sum(_single(xp.logical_not(finite), xp)), xp=xp)


def output_statistics(output: Tensor, layer: Any, xp: Any = ops) -> Tensor:
    """Mean, standard deviation, saturated share and dead share of an output; NaN where its kind has none.

    Args:
        output: Shape (batch, ..., units), or with channels first.
        layer: The layer that made it. A unit is dead when it is zero for the whole batch.
        xp: See `Sampler.measure`.

    Returns:
        float32, shape (4,).
    """
    values, kind = _single(output, xp), activation_of(layer)
    saturated = dead = math.nan
    if kind in SATURATION:
        low, high = SATURATION[kind]
        saturated = xp.mean(xp.where(xp.logical_or(values <= low, values >= high), 1.0, 0.0))
    elif kind in RELU_FAMILY and len(values.shape) > 1:
        units = 1 if getattr(layer, "data_format", "") == "channels_first" else len(values.shape) - 1
        others = tuple(axis for axis in range(len(values.shape)) if axis != units)
        dead = xp.mean(xp.where(xp.max(values, axis=others) <= 0, 1.0, 0.0))
    return _row(xp.mean(values), xp.std(values), saturated, dead, xp=xp)


def _single(tensor: Tensor, xp: Any) -> Tensor:
    return np.asarray(tensor, np.float32) if xp is np else ops.cast(tensor, "float32")


def _row(*parts: Any, xp: Any) -> Tensor:
    return np.array(parts, np.float32) if xp is np else ops.stack([ops.cast(part, "float32") for part in parts])


def _activation_layers(model: keras.Model) -> list[Any]:
    """Layers that are an activation or end with one, each once, in order of definition."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    found = {id(layer): layer for layer in layers if activation_of(layer) in ACTIVATIONS}
    return list(found.values())
