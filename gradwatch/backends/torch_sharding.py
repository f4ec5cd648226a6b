"""Which ranks hold a torch parameter together: DTensor, FSDP, DistributedDataParallel, or one rank alone."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.backends.shares import Holding


def world() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) where no process group is initialised."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; never imports what the user did not."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_partial(gradient: Any) -> bool:
    """Whether a gradient is still a sum over ranks: a DTensor that is `Partial` over more than one of them."""
    return is_dtensor(gradient) and any(
        placement.is_partial() and gradient.device_mesh.size(dim) > 1
        for dim, placement in enumerate(gradient.placements)
    )


def local(tensors: Sequence[Any]) -> list[Any]:
    """The tensors; of a DTensor the part on this rank, which shares its memory."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return list(tensors)
    kind = module.DTensor
    return [tensor._local_tensor if type(tensor) is kind else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """A scalar as a plain tensor: that of a DTensor is added up over its ranks, where it is not yet."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def is_wrapped_by_fsdp1(model: nn.Module) -> bool:
    """Whether gradients arrive at flat parameters, where hooks on the model's own are never called."""
    return bool(_fsdp1_modules(model))


def holdings(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Holding]:
    """How the ranks hold each parameter, in the order of the parameters."""
    rank, _ = world()
    flat = {
        id(parameter): (handle, place)
        for module in _fsdp1_modules(model)
        if (handle := module._handle) is not None
        for place, parameter in enumerate(handle.flat_param._params or ())
    }
    reduced = _reduced_by_ddp(model)
    found = []
    for parameter in parameters:
        if is_dtensor(parameter):
            found.append(Holding(ranks_of(parameter), shape=tuple(parameter.shape)))
        elif id(parameter) in flat:
            handle, place = flat[id(parameter)]
            ranks = torch.distributed.get_process_group_ranks(handle.process_group)
            shape = tuple(handle.flat_param._shapes[place])
            found.append(Holding(tuple(ranks) if handle.uses_sharded_strategy else (rank,), shape=shape))
        else:
            mark = None if id(parameter) in reduced else _fingerprint(parameter)
            found.append(Holding((rank,), shape=tuple(parameter.shape), fingerprint=mark))
    return found


def ranks_of(tensor: Any) -> tuple[int, ...]:
    """The ranks whose parts make up one copy of a DTensor, this rank's among them."""
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return (torch.distributed.get_rank(),)
    index = tuple(
        at if placement.is_replicate() else slice(None)
        for at, placement in zip(coordinate, tensor.placements, strict=True)
    )
    return tuple(sorted(np.ravel(mesh.mesh.numpy()[index]).tolist()))


def _fsdp1_modules(model: nn.Module) -> list[Any]:
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return (
        []
        if module is None
        else [each for each in model.modules() if isinstance(each, module.FullyShardedDataParallel)]
    )


def wrappers_of(model: nn.Module, kind: type[Any]) -> list[Any]:
    """The objects of a kind, of all there are, whose attribute `module` is the model or a module in it."""
    inside = {id(module) for module in model.modules()}
    return [each for each in gc.get_objects() if issubclass(type(each), kind) and id(each.module) in inside]


def _reduced_by_ddp(model: nn.Module) -> set[int]:
    """Ids of the parameters whose gradients a DistributedDataParallel averages.

    Trainers hand over the model inside, and users may: then whoever wraps it is found among all objects there are.
    """
    kind = nn.parallel.DistributedDataParallel
    wrappers = [each for each in model.modules() if isinstance(each, kind)] or wrappers_of(model, kind)
    return {
        id(parameter)
        for wrapper in wrappers
        for name, parameter in wrapper.module.named_parameters()
        if name not in wrapper.parameters_to_ignore
    }


@torch.no_grad()
def _fingerprint(parameter: nn.Parameter) -> float:
    return float(parameter.double().sum()) if parameter.device.type != "meta" and not parameter.is_complex() else 0.0


class AtBackward:
    """Tells when a backward pass of a model begins, by a hook on its outputs; inert in copies and pickles.

    Args:
        begins: Called at the start of each pass.
    """

    def __init__(self, begins: Any = None) -> None:
        self._begins = begins

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._begins is not None:
            for tensor in _tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._arrived)

    def _arrived(self, _: Tensor) -> None:
        self._begins()

    def __reduce__(self) -> tuple[type[AtBackward], tuple[()]]:
        return AtBackward, ()


def _tensors_in(output: Any) -> list[Tensor]:
    leaves: list[Any] = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
