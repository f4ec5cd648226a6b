"""One batch through a torch model, measured layer by layer, with the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.backends.torch_activations import ACTIVATIONS, output_statistics
from gradwatch.backends.torch_model import clean_name, describe
from gradwatch.probes import LayerProbe
from gradwatch.records import Parameter


def probe(
    model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[..., Any]
) -> tuple[float, list[LayerProbe], dict[str, float], list[str]]:
    """Forward and backward of one batch.

    Args:
        model: Used in its present mode.
        inputs: A tensor, or a tuple or mapping of arguments of the model.
        targets: Second argument of `loss_fn`.
        loss_fn: `loss_fn(outputs, targets)` to a scalar tensor.

    Returns:
        The loss, the layers in order of first use, the gradient norm of each parameter that has one, and the names of
        all trainable parameters.
    """
    parameters, tensors = describe(model, [])
    with _untouched(model, tensors), _Hooks(model, parameters) as seen, torch.enable_grad():
        loss = loss_fn(_call(model, inputs), targets)
        loss.backward()
        norms = {
            p.name: float(torch.linalg.vector_norm(t.grad.double()))
            for p, t in zip(parameters, tensors, strict=True)
            if t.grad is not None
        }
    for layer in seen.values():
        own = [norms[p.name] ** 2 for p in parameters if p.layer == layer.layer and p.name in norms]
        layer.grad_norm = sum(own) ** 0.5 if own else float("nan")
    return float(loss.detach()), list(seen.values()), norms, [p.name for p in parameters if p.trainable]


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        return model(*inputs)
    return model(inputs)


@contextmanager
def _untouched(model: nn.Module, tensors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients, buffers, random state and mode are given back as they were."""
    grads = [tensor.grad for tensor in tensors]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [tensor.device for tensor in tensors if tensor.device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=devices):
            for tensor in tensors:
                tensor.grad = None
            yield
    finally:
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = grad
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


class _Hooks:
    """Hooks on the layers that own parameters and on the activations behind them, for one pass."""

    def __init__(self, model: nn.Module, parameters: Sequence[Parameter]) -> None:
        self.seen: dict[str, LayerProbe] = {}
        self._before_activation: LayerProbe | None = None
        layers = {p.layer: p for p in parameters}
        self._handles = []
        for raw, module in model.named_modules():
            name, kind = clean_name(raw), type(module).__name__
            if name in layers:
                self._handles.append(module.register_forward_hook(self._on_layer(layers[name])))
            elif kind in ACTIVATIONS:
                self._handles.append(module.register_forward_hook(self._on_activation(kind)))

    def __enter__(self) -> dict[str, LayerProbe]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_layer(self, parameter: Parameter) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or parameter.layer in self.seen:
                return
            found = LayerProbe(parameter.layer, kind=parameter.kind, activation=parameter.activation)
            self.seen[parameter.layer] = self._before_activation = found
            _measure(found, tensor.detach())
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: _measure_gradient(found, grad))

        return hook

    def _on_activation(self, kind: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            layer, self._before_activation = self._before_activation, None
            if layer is not None and isinstance(output, Tensor):
                layer.activation = kind
                _measure_activation(layer, output.detach(), kind)

        return hook


def _measure(layer: LayerProbe, output: Tensor) -> None:
    values = output.double()
    layer.activation_mean = float(values.mean())
    layer.activation_std = float(values.std(correction=0))


def _measure_activation(layer: LayerProbe, output: Tensor, kind: str) -> None:
    _measure(layer, output)
    _, _, layer.saturated_fraction, layer.dead_fraction = output_statistics(output, kind).tolist()


def _measure_gradient(layer: LayerProbe, grad: Tensor) -> None:
    layer.output_grad_rms = float(grad.double().square().mean().sqrt())
