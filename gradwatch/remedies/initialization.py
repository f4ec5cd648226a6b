"""New weights for layers: by the activation behind each, or fitted to a batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.remedies.network import CONVOLUTION, RECURRENT, TRANSPOSED, WEIGHT_LAYERS, Change, Layer, layers_of

SCHEMES = ("auto", "data", "kaiming", "xavier", "orthogonal", "lsuv", "default")
_RELU_FAMILY = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "GELU", "SiLU", "Mish", "ELU", "CELU", "Hardswish")
_TANH_FAMILY = ("Tanh", "Hardtanh", "Softsign")
_SIGMOID_FAMILY = ("Sigmoid", "Hardsigmoid")
#: Largest input of an activation that is none of the known ones, where even an exponential is all but linear: twelve in
#: a row make 3 of an outlier of 1.5, and infinity of it when this is 0.5.
_CAUTIOUS = 0.1
#: Sizes of the inputs of an activation between which an initialisation is sound: for a tanh, not saturated.
_SOUND = {"tanh": (0.05, 1.5), "relu": (0.2, 5.0)}
#: Share of units that are zero on the whole batch, above which a layer of ReLUs dies out.
_MOST_DEAD = 0.75
#: Fewer numbers than this say nothing about a unit's mean and variance.
_LEAST_SAMPLES = 8


def initialize(
    model: nn.Module, scheme: str = "auto", *, layers: Sequence[str] | None = None, batch: Any = None
) -> list[Change]:
    """Give layers new weights.

    Args:
        model: Changed in place.
        scheme: `auto` follows the layer and its activation (Kaiming for the ReLU family: He et al. 2015; Xavier for
            tanh and
            sigmoid: Glorot and Bengio 2010; orthogonal for recurrent weights: Saxe et al. 2014; zero bias) and, with a
            batch, fits the result to it. `data` is `auto` that demands a batch. `lsuv` is Mishkin and Matas 2016:
            orthonormal, then scaled to variance 1 on the batch. `kaiming`, `xavier` and `orthogonal` for all layers
            alike. `default` calls each module's own `reset_parameters`.
        layers: Dotted names; None means all linear, convolutional and recurrent layers.
        batch: Inputs of the model: a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Returns:
        What was changed, layer by layer.

    Raises:
        UnknownNameError: No such scheme or layer.
        ConfigurationError: A layer that cannot be initialised, or a scheme that needs a batch without one.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> print(*initialize(model), sep="; ")
        0: kaiming for ReLU; 2: kaiming for ReLU
    """
    forward = None if batch is None else lambda: _call(model, batch)
    return fill(model, scheme, layers=layers, forward=forward)


@torch.no_grad()
def fill(
    model: nn.Module, scheme: str, *, layers: Sequence[str] | None = None, forward: Callable[[], Any] | None = None
) -> list[Change]:
    """`initialize` with a forward pass over some batch in place of the batch."""
    if scheme not in SCHEMES:
        raise UnknownNameError.among("scheme", scheme, SCHEMES)
    if forward is None and scheme in ("data", "lsuv"):
        raise ConfigurationError(f"scheme {scheme!r} needs a 'batch' of inputs")
    known = layers_of(model)
    targets = _chosen(model, known, layers)
    before = dict(zip((layer.name for layer in known[1:]), map(_activation, known), strict=False))
    changes = [Change(layer.name, _filled(layer, scheme, before.get(layer.name, ""))) for layer in targets]
    if forward is not None and scheme in ("auto", "data", "lsuv"):
        changes += _fit(model, targets, forward, scaled_only=scheme == "lsuv")
    return changes


def _chosen(model: nn.Module, known: list[Layer], names: Sequence[str] | None) -> list[Layer]:
    if names is None:
        return known
    by_name = {layer.name: layer for layer in known}
    modules = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}
    found = []
    for name in names:
        if name not in modules:
            raise UnknownNameError.among("layer", name, by_name)
        layer = by_name.get(name, Layer(name, modules[name]))
        if not isinstance(layer.module, (*WEIGHT_LAYERS, *RECURRENT)) and not hasattr(layer.module, "reset_parameters"):
            kind = type(layer.module).__name__
            raise ConfigurationError(f"layer {name!r} ({kind}) cannot be initialised: it has no 'reset_parameters'")
        found.append(layer)
    return found


def _filled(layer: Layer, scheme: str, before: str) -> str:
    """Fill a layer's parameters; returns in words how. `before` is the activation whose outputs it takes."""
    module = layer.module
    if scheme == "default" or not isinstance(module, (*WEIGHT_LAYERS, *RECURRENT)):
        module.reset_parameters()  # type: ignore[operator]
        return "its own reset_parameters"
    if isinstance(module, RECURRENT):
        return _fill_recurrent(module)
    weight = module.weight
    if isinstance(module.bias, Tensor):
        module.bias.zero_()
    # The output layer keeps the size of its inputs; what is behind it belongs to the loss.
    activation = before if layer.is_output and before in _RELU_FAMILY else "" if layer.is_output else _activation(layer)
    if scheme in ("orthogonal", "lsuv"):
        nn.init.orthogonal_(weight)
        return "orthogonal"
    if scheme == "kaiming" or (scheme != "xavier" and activation in _RELU_FAMILY):
        slope = getattr(layer.activation, "negative_slope", 0.0)
        nn.init.kaiming_normal_(weight, a=slope if isinstance(slope, float) else 0.0, nonlinearity="leaky_relu")
        return f"kaiming for {activation}" if activation else "kaiming"
    if activation == "SELU":
        nn.init.kaiming_normal_(weight, nonlinearity="linear")
        return "lecun for SELU"
    is_squashed = activation in (*_TANH_FAMILY, *_SIGMOID_FAMILY)
    # Glorot and Bengio 2010; the slope of a sigmoid at 0 is a quarter of that of tanh.
    nn.init.xavier_uniform_(weight, gain=4.0 if activation in _SIGMOID_FAMILY else 1.0)
    return f"xavier for {activation}" if is_squashed else "xavier"


def _activation(layer: Layer) -> str:
    return type(layer.activation).__name__ if layer.activation is not None else ""


def _fill_recurrent(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.split(parameter.shape[1]):
                nn.init.orthogonal_(gate)
        elif name.startswith("bias"):
            parameter.zero_()
            if isinstance(module, (nn.LSTM, nn.LSTMCell)) and name.startswith("bias_ih"):
                # Forget gates that begin open (Jozefowicz et al. 2015).
                parameter[len(parameter) // 4 : len(parameter) // 2] = 1.0
        else:
            nn.init.xavier_uniform_(parameter)
    return "orthogonal recurrent weights, xavier input weights"


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _fit(model: nn.Module, targets: Sequence[Layer], forward: Callable[[], Any], *, scaled_only: bool) -> list[Change]:
    """Scale (and shift) each hidden layer until its outputs on one batch have unit variance (and mean 0).

    Mishkin and Matas 2016, All you need is a good init; Salimans and Kingma 2016, Weight Normalization, section 3. All
    in one forward pass, since each layer hands on its corrected output. Layers that one pass calls several times are
    recurrent: theirs become orthogonal.
    """
    hidden = {id(t.module): t for t in targets if isinstance(t.module, WEIGHT_LAYERS) and not t.is_output}
    changes: list[Change] = []
    with _kept_random_state(model):
        calls = _count_calls(hidden, forward)
        for key, layer in list(hidden.items()):
            if calls.get(key, 0) > 1:
                weight: Tensor = layer.module.weight  # type: ignore[assignment]
                nn.init.orthogonal_(weight)
                changes.append(Change(layer.name, "orthogonal, as it is called again and again"))
            if calls.get(key, 0) != 1:
                del hidden[key]
        handles = [
            layer.module.register_forward_hook(_corrector(layer, scaled_only=scaled_only)) for layer in hidden.values()
        ]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
    return changes + [Change(layer.name, "fitted to a batch") for layer in hidden.values()]


def _corrector(layer: Layer, *, scaled_only: bool) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def correct(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        unit = 1 if isinstance(module, CONVOLUTION) else output.ndim - 1
        if output.numel() < _LEAST_SAMPLES * output.shape[unit] or not torch.isfinite(output).all():
            return None
        others = [axis for axis in range(output.ndim) if axis != unit]
        if scaled_only:
            mean, std = output.new_zeros(()), output.square().mean().sqrt()
        else:
            mean, std = _place_and_spread(layer, output, others, can_shift=module.bias is not None)
        std = torch.where(std > 1e-6, std, 1.0)
        _rescale(module, mean.flatten(), std.flatten())
        return (output - mean) / std

    return correct


def _place_and_spread(layer: Layer, output: Tensor, others: list[int], *, can_shift: bool) -> tuple[Tensor, Tensor]:
    """What is to be subtracted from a layer's outputs, and what they are then to be divided by.

    A ReLU network keeps its signal when layers are scaled, and not when they are centred (its gradient then grows by
    1.21 a layer: Yang et al. 2019, A Mean Field Theory of Batch Normalization), so only those that die out are. A tanh
    network is best left in its linear range. A sigmoid's outputs have a mean that grows from layer to layer, and so
    have those of an activation that nobody
    knows: their layers are centred unit by unit.
    """
    name = _activation(layer)
    size = output.square().mean().sqrt()
    nothing = torch.zeros((), dtype=output.dtype, device=output.device)
    if name in _RELU_FAMILY and can_shift:
        is_dead = output.amax(others, keepdim=True) <= 0
        is_dying = is_dead.double().mean() > _MOST_DEAD
        return torch.where(is_dead & is_dying, output.mean(others, keepdim=True), nothing), _needed(size, "relu", 1.0)
    if name in _TANH_FAMILY:
        return nothing, _needed(size, "tanh", 0.5)
    if name == "" or name in _RELU_FAMILY or not can_shift:
        return nothing, size
    mean = output.mean(others, keepdim=True)
    away = output - mean
    std = away.square().mean(others, keepdim=True).sqrt()
    if name not in _SIGMOID_FAMILY and name != "SELU":
        std = torch.maximum(std, away.abs().amax(others, keepdim=True) / _CAUTIOUS)
    return mean, std


def _needed(size: Tensor, family: str, aim: float) -> Tensor:
    """What to divide outputs of this size by: 1 where they are sound."""
    low, high = _SOUND[family]
    return torch.where((size > low) & (size < high), torch.ones_like(size), size / aim)


def _rescale(module: nn.Module, mean: Tensor, std: Tensor) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    axis = 1 if isinstance(module, TRANSPOSED) else 0
    if len(std) == 1 or weight.shape[axis] == len(std):
        shape = [1] * weight.ndim
        shape[axis] = len(std)
        weight.div_(std.view(shape))
        if isinstance(module.bias, Tensor):
            module.bias.sub_(mean).div_(std)


def _count_calls(layers: dict[int, Layer], forward: Callable[[], Any]) -> dict[int, int]:
    calls: dict[int, int] = {}

    def count(module: nn.Module, inputs: Any) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1

    handles = [layer.module.register_forward_pre_hook(count) for layer in layers.values()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextlib.contextmanager
def _kept_random_state(model: nn.Module) -> Iterator[None]:
    """Extra forward passes draw no random number from the training (dropout), and leave running statistics alone."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=devices):
        yield
    for name, buffer in model.named_buffers():
        if not math.prod(buffer.shape) or torch.equal(buffer, buffers[name]):
            continue
        buffer.copy_(buffers[name])
