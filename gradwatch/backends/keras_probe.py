"""One batch through a Keras model, measured layer by layer, with the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from gradwatch.backends.keras_fill import owners_of
from gradwatch.backends.keras_model import Columns
from gradwatch.backends.keras_samples import RELU_FAMILY, SATURATION
from gradwatch.backends.keras_tap import replaced
from gradwatch.backends.keras_values import Array, Values
from gradwatch.probes import LayerProbe

Tensor = Any


def probe(
    model: keras.Model, inputs: Any, targets: Any, loss_fn: Callable[..., Any]
) -> tuple[float, list[LayerProbe], dict[str, float], list[str]]:
    """Forward and backward of one batch.

    Args:
        model: Built; called with `training=True`.
        inputs: What the model is called with.
        targets: Second argument of `loss_fn`.
        loss_fn: `loss_fn(outputs, targets)` to a scalar tensor, or a `keras.losses.Loss`.

    Returns:
        The loss, the layers in order, the gradient norm of each variable that has one, and the names of all variables
        in training.
    """
    columns = Columns(model)
    access = Values(model, ())
    before = [(variable, access.read(variable)) for variable in model.non_trainable_variables]
    try:
        outputs = _Outputs(model, columns)
        trained = [variable for variable in columns.variables if variable.trainable]
        loss, grads, output_grads = outputs.differentiate(trained, inputs, targets, loss_fn)
    finally:
        for variable, value in before:
            variable.assign(value)
    norms = {
        columns.parameters[place].name: float(np.linalg.norm(grad.astype(np.float64)))
        for variable, grad in zip(trained, grads, strict=True)
        if grad is not None and (place := columns.of(variable)) is not None
    }
    layers = [
        _probed(parameters, outputs.values[key], output_grads[key], norms)
        for key, parameters in outputs.layers.items()
        if key in outputs.values
    ]
    return loss, layers, norms, [parameter.name for parameter in columns.parameters if parameter.trainable]


def _probed(parameters: list[Any], output: Array, grad: Array | None, norms: Mapping[str, float]) -> LayerProbe:
    first, values = parameters[0], output.astype(np.float64)
    found = LayerProbe(first.layer, kind=first.kind, activation=first.activation)
    found.activation_mean, found.activation_std = float(values.mean()), float(values.std())
    if first.activation in SATURATION:
        low, high = SATURATION[first.activation]
        found.saturated_fraction = float(((values <= low) | (values >= high)).mean())
    if first.activation in RELU_FAMILY:
        found.dead_fraction = float((values.reshape(-1, values.shape[-1]) <= 0.0).all(axis=0).mean())
    if grad is not None:
        found.output_grad_rms = float(np.sqrt(np.mean(np.square(grad.astype(np.float64)))))
    own = [norms[parameter.name] ** 2 for parameter in parameters if parameter.name in norms]
    found.grad_norm = sum(own) ** 0.5 if own else float("nan")
    return found


class _Outputs:
    """Sees the first output of each layer that owns variables, and lets a perturbation be added to it.

    The gradient with respect to a perturbation of zero is that with respect to the output.
    """

    def __init__(self, model: keras.Model, columns: Columns) -> None:
        owners = owners_of(model)
        self._model = model
        self._owners: dict[int, Any] = {}
        self.layers: dict[int, list[Any]] = {}
        for variable, parameter in zip(columns.variables, columns.parameters, strict=True):
            owner = owners.get(id(variable), model)
            self._owners[id(owner)] = owner
            self.layers.setdefault(id(owner), []).append(parameter)
        self.values: dict[int, Array] = {}
        self._seen: dict[int, Tensor] = {}
        self._added: dict[int, Tensor] = {}

    def _call(self, key: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if key in self._seen or not hasattr(output, "shape"):
                return output
            if key in self._added:
                output = output + keras.ops.cast(self._added[key], output.dtype)
            self._seen[key] = output
            return output

        return call

    def _loss(self, inputs: Any, targets: Any, loss_fn: Callable[..., Any]) -> Tensor:
        self._seen = {}
        calls = [(owner, "call", self._call(key, owner.call)) for key, owner in self._owners.items()]
        with replaced(calls):
            outputs = self._model(inputs, training=True)
            # A loss of Keras takes the targets first.
            pair = (targets, outputs) if isinstance(loss_fn, keras.losses.Loss) else (outputs, targets)
            return keras.ops.mean(loss_fn(*pair))

    def differentiate(
        self, variables: Sequence[Any], inputs: Any, targets: Any, loss_fn: Callable[..., Any]
    ) -> tuple[float, list[Array | None], dict[int, Array | None]]:
        """The loss, and its gradients with respect to variables and to the layers' outputs."""
        inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)
        targets = keras.tree.map_structure(keras.ops.convert_to_tensor, targets)
        self._loss(inputs, targets, loss_fn)
        self.values = {key: _array(output) for key, output in self._seen.items()}
        zeros = {key: np.zeros(value.shape, "float32") for key, value in self.values.items()}
        backend = {"tensorflow": self._tensorflow, "torch": self._torch, "jax": self._jax}[keras.backend.backend()]
        loss, grads, added = backend(variables, zeros, lambda: self._loss(inputs, targets, loss_fn))
        self._added = {}
        return float(_array(loss)), [_array(grad) for grad in grads], {k: _array(g) for k, g in added.items()}

    def _tensorflow(self, variables: Sequence[Any], zeros: dict[int, Array], loss_of: Callable[[], Any]) -> Any:
        import tensorflow as tf

        self._added = {key: tf.constant(value) for key, value in zeros.items()}
        with tf.GradientTape() as tape:
            for tensor in self._added.values():
                tape.watch(tensor)
            loss = loss_of()
        held = [variable.value for variable in variables]
        grads, added = tape.gradient(loss, [held, list(self._added.values())])
        return (
            loss,
            [None if g is None else tf.convert_to_tensor(g) for g in grads],
            dict(zip(zeros, added, strict=True)),
        )

    def _torch(self, variables: Sequence[Any], zeros: dict[int, Array], loss_of: Callable[[], Any]) -> Any:
        import torch

        device = variables[0].value.device
        self._added = {key: torch.tensor(value, device=device, requires_grad=True) for key, value in zeros.items()}
        with torch.enable_grad():
            loss = loss_of()
        held = [*(variable.value for variable in variables), *self._added.values()]
        grads = torch.autograd.grad(loss, held, allow_unused=True)
        return loss, grads[: len(variables)], dict(zip(zeros, grads[len(variables) :], strict=True))

    def _jax(self, variables: Sequence[Any], zeros: dict[int, Array], loss_of: Callable[[], Any]) -> Any:
        import jax

        others = [variable for variable in self._model.variables if not any(variable is v for v in variables)]

        def loss(held: list[Any], added: dict[int, Any]) -> Any:
            self._added = added
            state = [*zip(variables, held, strict=True), *((v, v.value) for v in others)]
            with keras.StatelessScope(state_mapping=state):
                return loss_of()

        held = [variable.value for variable in variables]
        found, (grads, added) = jax.value_and_grad(loss, argnums=(0, 1))(held, zeros)
        return found, grads, added


def _array(tensor: Any) -> Any:
    if tensor is None:
        return None
    tensor = tensor.detach().cpu() if hasattr(tensor, "detach") else tensor
    return np.asarray(tensor)
