"""What remedies need to know of a torch network: its weight layers in order, the activation behind each, the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from gradwatch.errors import ConfigurationError

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHT_LAYERS = (nn.Linear, *CONVOLUTION)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
)  # fmt: skip
#: Modules without parameters that are no activation.
_PASSIVE = (
    "Dropout", "AlphaDropout", "FeatureAlphaDropout", "Identity", "Flatten", "Unflatten", "Pool", "Pad", "Upsample",
    "Shuffle", "Fold", "Unfold", "Loss", "Similarity", "Distance",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a remedy changed.

    Args:
        where: Dotted name of the module.
        what: What was done, in a few words.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Layer:
    """A layer with weights and what comes behind it.

    Args:
        name: Dotted name.
        module: The layer.
        activation: The activation behind it; None where the next layer or the end comes first.
        activation_name: Its dotted name.
        is_output: Whether no further layer with weights follows.
    """

    name: str
    module: nn.Module
    activation: nn.Module | None = None
    activation_name: str = ""
    is_output: bool = False


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation: of torch, or a leaf of the user's own without parameters."""
    if type(module).__module__ == "torch.nn.modules.activation":
        return not isinstance(module, nn.MultiheadAttention)
    if any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False)):
        return False
    name = type(module).__name__
    is_torch = type(module).__module__.startswith("torch.")
    return not is_torch and not isinstance(module, (*NORMS, nn.Identity)) and not any(word in name for word in _PASSIVE)


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers with weights in the order of their definition, each once."""
    found: list[Layer] = []
    behind: dict[str, tuple[str, nn.Module]] = {}
    for name, module in _leaves(model):
        if isinstance(module, (*WEIGHT_LAYERS, *RECURRENT)):
            found.append(Layer(name, module))
        elif found and is_activation(module):
            behind.setdefault(found[-1].name, (name, module))
    last = found[-1].name if found else ""
    complete = []
    for layer in found:
        name, activation = behind.get(layer.name) or ("", None)
        complete.append(Layer(layer.name, layer.module, activation, name, is_output=layer.name == last))
    return complete


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (*WEIGHT_LAYERS, *RECURRENT)) or not any(True for _ in module.children()):
            yield name.replace("_orig_mod.", ""), module


def require_plain(model: nn.Module, what: str) -> None:
    """Refuse a model whose modules are not simply called one after the other in Python.

    Raises:
        ConfigurationError: It is compiled, scripted or spread over processes.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    for kind, why in (
        ("OptimizedModule", "compiled: apply it to the model before torch.compile"),
        ("RecursiveScriptModule", "scripted: apply it to the model before torch.jit"),
        ("DistributedDataParallel", "wrapped for distributed training: apply it before wrapping"),
        ("FullyShardedDataParallel", "sharded: apply it before sharding"),
    ):
        if kind in kinds:
            raise ConfigurationError(f"{what} cannot change this model, which is {why}")
