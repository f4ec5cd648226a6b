"""What a torch model consists of: parameters with their layer, depth, kind, following activation and aliases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradwatch.backends.torch_graph import Uses
from gradwatch.errors import ModelError
from gradwatch.records import Parameter

_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in (
        "CELU", "ELU", "GELU", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "Mish", "PReLU", "ReLU", "ReLU6",
        "RReLU", "SELU", "Sigmoid", "SiLU", "Softmax", "LogSoftmax", "Softplus", "Softsign", "Tanh",
    )
)  # fmt: skip
#: Class names of activations that torch lacks.
_OTHER_ACTIVATIONS = ("Exp", "Exponential")
#: Modules that may stand between a layer and its activation.
_TRANSPARENT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Unflatten)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_WRAPPERS = ("DistributedDataParallel", "DataParallel")


def describe(model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[list[Parameter], list[nn.Parameter]]:
    """The parameters of a model, and those of the optimizers that the model does not hold.

    Args:
        model: Compiled and wrapped models are described by the names of the model inside.
        optimizers: Their further parameters come last, named after the optimizer.

    Returns:
        Descriptions and tensors, in the same order. Tied weights appear once, with their other names as aliases.

    Raises:
        ModelError: No parameters, uninitialised lazy parameters, or an optimizer that holds none of the model's.
    """
    prefix = "module." if type(model).__name__ in _WRAPPERS else ""
    inside = model.module if prefix else model
    named: dict[int, nn.Parameter] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ModelError(
                f"parameter {name!r} is not initialised yet: run one batch through the model before watch()"
            )
        named.setdefault(id(parameter), parameter)
        names.setdefault(id(parameter), []).append(clean_name(name, prefix))
    if not named:
        raise ModelError(f"{type(model).__name__} has no parameters to watch")
    modules = {clean_name(name, prefix): module for name, module in model.named_modules()}
    activations = following_activations(modules)
    depth: dict[str, int] = {}
    described, tensors = [], []
    for key, parameter in named.items():
        first, *aliases = names[key]
        layer = first.rpartition(".")[0] or first
        described.append(
            Parameter(
                first,
                shape=tuple(parameter.shape),
                layer=layer,
                depth=depth.setdefault(layer, len(depth)),
                dtype=str(parameter.dtype).removeprefix("torch."),
                kind=type(modules.get(layer, inside)).__name__,
                activation=activations.get(layer, ""),
                aliases=tuple(aliases),
                trainable=parameter.requires_grad,
            )
        )
        tensors.append(parameter)
    for number, optimizer in enumerate(optimizers):
        held = held_by(optimizer)
        if not any(id(parameter) in named for parameter in held):
            raise ModelError(f"{type(optimizer).__name__} holds none of the parameters of {type(model).__name__}")
        for place, parameter in enumerate(held):
            if id(parameter) not in named:
                named[id(parameter)] = parameter
                described.append(outsider(f"optimizer{number}.{place}", parameter, depth=len(depth)))
                tensors.append(parameter)
    return described, tensors


def outsider(name: str, parameter: nn.Parameter, *, depth: int) -> Parameter:
    """The description of a parameter that an optimizer holds and the model does not."""
    dtype = str(parameter.dtype).removeprefix("torch.")
    return Parameter(name, shape=tuple(parameter.shape), layer=name, depth=depth, dtype=dtype)


def held_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clean_name(name: str, prefix: str = "") -> str:
    """A parameter's or module's name as the user wrote it, without what compiling and wrapping put in."""
    name = name.replace("_orig_mod.", "").removesuffix("_orig_mod").replace("_fsdp_wrapped_module.", "")
    return name.removeprefix(prefix)


def following_activations(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Layer name to the type of the activation module that follows it in the order of definition."""
    parents = {name.rpartition(".")[0] for name in modules if name}
    leaves = [(name, module) for name, module in modules.items() if name not in parents]
    found: dict[str, str] = {}
    waiting: list[str] = []
    for name, module in leaves:
        if isinstance(module, _ACTIVATIONS) or type(module).__name__ in _OTHER_ACTIVATIONS:
            found.update(dict.fromkeys(waiting, type(module).__name__))
            waiting = []
        elif isinstance(module, _NORMS):
            waiting.append(name)
        elif not isinstance(module, _TRANSPARENT) and next(module.parameters(recurse=False), None) is not None:
            waiting = [name]
    return found


def by_execution(parameters: Sequence[Parameter], backward_order: Iterable[int]) -> list[Parameter]:
    """The parameters with depths by order of first use.

    Gradients arrive in the reverse order of first use, so the order of arrival tells it without hooks on modules.

    Args:
        parameters: With depths by order of definition.
        backward_order: Places of the parameters in the order in which their gradients arrived.
    """
    last_use: dict[str, int] = {}
    for rank, place in enumerate(backward_order):
        last_use.setdefault(parameters[place].layer, rank)
    if not last_use:
        return list(parameters)
    position: dict[str, tuple[float, int]] = {}
    current = float("-inf")
    for order, layer in enumerate(dict.fromkeys(p.layer for p in parameters)):
        # A layer without gradient stays where it was defined: right behind the layer before it.
        current = -last_use[layer] if layer in last_use else current
        position[layer] = (current, order)
    depth = {layer: place for place, layer in enumerate(sorted(position, key=position.__getitem__))}
    return [p if p.depth == depth[p.layer] else dataclasses.replace(p, depth=depth[p.layer]) for p in parameters]


def with_uses(parameters: Sequence[Parameter], uses: Uses) -> list[Parameter]:
    """The parameters with what the autograd graph tells: depths by order of first use, activations in functional form.

    Args:
        parameters: As described so far; what modules told of activations stays.
        uses: Of the parameters by place, as `torch_graph.read_graph` gives them.
    """
    first: dict[str, int] = {}
    activation: dict[str, str] = {}
    for place, use in uses.items():
        layer = parameters[place].layer
        first[layer] = min(use.order, first.get(layer, use.order))
        if use.activation:
            activation.setdefault(layer, use.activation)
    latest_first = sorted(uses, key=lambda place: -first[parameters[place].layer])
    ordered = by_execution(parameters, latest_first)
    return [
        p if p.activation or p.layer not in activation else dataclasses.replace(p, activation=activation[p.layer])
        for p in ordered
    ]


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, went through `torch.compile`."""
    return any(
        name.endswith("_orig_mod") or "_orig_mod." in name or getattr(module, "_compiled_call_impl", None) is not None
        for name, module in model.named_modules()
    )
