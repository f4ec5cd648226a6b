"""Changes of a network's architecture in place, which keep its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.remedies.network import CONVOLUTION, Change, Layer, is_activation, layers_of, require_plain

NORMS = ("batch", "layer", "group")
Kind = str | type[nn.Module] | Sequence[str | type[nn.Module]]


def replace_activation(
    model: nn.Module,
    old: Kind,
    new: str | type[nn.Module] | Callable[[], nn.Module],
    *,
    output: bool = False,
) -> list[Change]:
    """Replace activation modules; all weights stay.

    Args:
        model: Changed in place.
        old: Class, or its name, or several: `"Sigmoid"`, `nn.Tanh`, `("Sigmoid", "Tanh")`.
        new: Class, or name of a class of `torch.nn`, or a function that makes the new module.
        output: Also behind the last layer with weights, whose activation belongs to the loss.

    Returns:
        What was changed.

    Raises:
        UnknownNameError: `new` names no activation of `torch.nn`.
        ConfigurationError: There is none such (activations that the forward method calls as functions cannot be seen),
            or the model is compiled, scripted or distributed.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 1), nn.Sigmoid())
        >>> print(*replace_activation(model, "Sigmoid", "ReLU"))
        1: Sigmoid -> ReLU
    """
    require_plain(model, "replace_activation")
    wanted = _kinds(old)
    make = _maker(new)
    kept = set() if output else _output_activations(model)
    changes = []
    for name, module in list(model.named_modules()):
        if name not in kept and is_activation(module) and _is_one_of(module, wanted):
            made = _like(make(), module)
            _set(model, name, made)
            changes.append(Change(name, f"{type(module).__name__} -> {type(made).__name__}"))
    if not changes:
        words = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in wanted)
        raise ConfigurationError(f"no hidden activation module of kind {words} in {type(model).__name__}")
    return changes


def insert_norm(
    model: nn.Module,
    kind: str = "layer",
    *,
    layers: Sequence[str] | None = None,
    optimizer: Optimizer | None = None,
) -> list[Change]:
    """Put a normalisation in front of hidden activations; all weights and their names stay.

    Args:
        model: Changed in place: the activation becomes `Sequential(norm, activation)`.
        kind: `layer`, `batch` or `group` (one group). `layer` behind a convolution is `group`.
        layers: Names of the layers whose output is normalised; None means all hidden ones with an activation module.
        optimizer: The new parameters join it, as a group with the settings of its first.

    Returns:
        What was changed.

    Raises:
        UnknownNameError: No such kind or layer.
        ConfigurationError: Nothing to normalise, or the model is compiled, scripted or distributed.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> print(*insert_norm(model))
        1: LayerNorm in front of ReLU
    """
    require_plain(model, "insert_norm")
    if kind not in NORMS:
        raise UnknownNameError.among("kind of normalisation", kind, NORMS)
    hidden = {layer.name: layer for layer in layers_of(model) if not layer.is_output and layer.activation is not None}
    for name in layers or ():
        if name not in hidden:
            raise UnknownNameError.among("hidden layer with an activation", name, hidden)
    changes, fresh = [], []
    for name in layers or hidden:
        layer = hidden[name]
        norm = _norm_behind(layer, kind)
        if norm is None or layer.activation is None:
            continue
        _set(model, layer.activation_name, nn.Sequential(norm, layer.activation))
        fresh += list(norm.parameters())
        changes.append(Change(layer.activation_name, f"{type(norm).__name__} in front of {_name(layer.activation)}"))
    if not changes:
        raise ConfigurationError(f"no hidden layer of {type(model).__name__} is followed by an activation module")
    if optimizer is not None:
        join(optimizer, fresh)
    return changes


def mend_output(model: nn.Module) -> list[Change]:
    """Replace an output activation that lets no gradient through.

    A softmax over one unit is constant; a ReLU behind the last layer is zero, with zero gradient, for half of its
    inputs.

    Returns:
        What was changed; nothing where the output is sound.

    Examples:
        >>> print(*mend_output(nn.Sequential(nn.Linear(4, 1), nn.Softmax(dim=1))))
        1: Softmax -> Sigmoid
    """
    layer, made = _shut_output(model)
    if layer is None or layer.activation is None or made is None:
        return []
    require_plain(model, "mend_output")
    _set(model, layer.activation_name, made)
    return [Change(layer.activation_name, f"{_name(layer.activation)} -> {_name(made)}")]


def is_output_shut(model: nn.Module) -> bool:
    """Whether `mend_output` would change anything."""
    return _shut_output(model)[1] is not None


def _shut_output(model: nn.Module) -> tuple[Layer | None, nn.Module | None]:
    """The last layer and what should be behind it, where what is there lets no gradient through."""
    layer = next((layer for layer in layers_of(model) if layer.is_output), None)
    if layer is None:
        return None, None
    units = getattr(layer.module, "out_features", None)
    if units == 1 and isinstance(layer.activation, (nn.Softmax, nn.LogSoftmax)):
        return layer, nn.Sigmoid() if isinstance(layer.activation, nn.Softmax) else nn.LogSigmoid()
    return layer, nn.Softplus() if isinstance(layer.activation, (nn.ReLU, nn.ReLU6)) else None


def join(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Add parameters to an optimizer, with the settings of its first group."""
    if parameters:
        settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        optimizer.add_param_group({**settings, "params": list(parameters)})


def _norm_behind(layer: Layer, kind: str) -> nn.Module | None:
    module = layer.module
    weight = next(module.parameters())
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(module, nn.Linear):
        size = module.out_features
        return nn.BatchNorm1d(size, **place) if kind == "batch" else nn.LayerNorm(size, **place)
    if isinstance(module, CONVOLUTION):
        size = module.out_channels
        if kind == "batch":
            dims = {"1": nn.BatchNorm1d, "2": nn.BatchNorm2d, "3": nn.BatchNorm3d}[type(module).__name__[-2]]
            return dims(size, **place)
        return nn.GroupNorm(1, size, **place)
    return None


def _output_activations(model: nn.Module) -> set[str]:
    """Names of the activations behind the last layer with weights."""
    names = [name for name, _ in model.named_modules()]
    last = next((layer.name for layer in layers_of(model) if layer.is_output), "")
    return set(names[names.index(last) :]) if last in names else set()


def _kinds(old: Kind) -> list[str | type[nn.Module]]:
    kinds: list[Any] = list(old) if isinstance(old, (list, tuple)) else [old]
    for kind in kinds:
        if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ConfigurationError.of("old", "a class of torch modules or its name", kind)
    return kinds


def _is_one_of(module: nn.Module, kinds: Sequence[str | type[nn.Module]]) -> bool:
    return any(_name(module) == kind if isinstance(kind, str) else type(module) is kind for kind in kinds)


def _maker(new: str | type[nn.Module] | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    if isinstance(new, str):
        made = getattr(nn, new, None)
        if made is None or getattr(made, "__module__", "") != "torch.nn.modules.activation":
            known = [name for name in dir(nn.modules.activation) if name[0].isupper() and hasattr(nn, name)]
            raise UnknownNameError.among("activation", new, known)
        return made  # type: ignore[no-any-return]
    if not callable(new) or isinstance(new, nn.Module):
        raise ConfigurationError.of("new", "a class, the name of one, or a function that makes a module", new)
    return new


def _like(made: Any, old: nn.Module) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ConfigurationError.of("new", "something that makes a torch.nn.Module", made)
    return made.train(old.training)


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, (nn.Sequential, nn.ModuleList)) and last.isdigit():
        owner[int(last)] = module
    else:
        setattr(owner, last, module)
    module.train(model.training)


def is_saturating(module: nn.Module) -> bool:
    """Whether an activation's slope goes to zero or infinity: a sigmoid's kin, or one that grows exponentially."""
    probe = torch.tensor([-8.0, -4.0, 4.0, 8.0], requires_grad=True)
    try:
        with torch.enable_grad():
            output = module(probe)
            (slope,) = torch.autograd.grad(output.sum(), probe)
    except Exception:  # noqa: BLE001 -- a module of the user's own that takes no vector is no plain activation
        return False
    low, high = slope[:2].abs().max(), slope[2:].abs().max()
    return bool((low < 0.05) & (high < 0.05)) or bool(high > 8.0)
