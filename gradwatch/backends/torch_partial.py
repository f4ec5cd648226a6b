"""Gradients that are still sums over ranks when backward is over: `Partial` DTensors, as of `SequenceParallel` norms.

DTensor adds such a gradient up where an operation needs the whole of it: in `clip_grad_norm_`, else inside the step of
the optimizer. Its result passes by here and is measured, so that no collective is made for a norm to be recorded.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.backends.torch_device import on_host
from gradwatch.backends.torch_norms import flat
from gradwatch.backends.torch_sharding import is_dtensor, is_partial, ranks_of

#: Where torch keeps the function that changes how a DTensor is spread: for operations that need it, and for the user.
_MODULES = ("torch.distributed.tensor._dispatch", "torch.distributed.tensor._redistribute")
_NAME = "redistribute_local_tensor"


class Sums:
    """The norms of those gradients, by the places of their parameters.

    Args:
        parameters: In column order.

    Attributes:
        places: Where there is such a gradient since the last backward pass.
        norms: Of those that are known since then; numbers, or scalar tensors on an accelerator.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = [(place, each) for place, each in enumerate(parameters) if may_be_partial(each)]
        self._awaited: dict[int, tuple[int, nn.Parameter]] = {}
        self.places: list[int] = []
        self.norms: dict[int, Any] = {}

    def expect(self) -> None:
        """A backward pass is over: look which gradients are sums."""
        self.norms = {}
        found = [(place, parameter) for place, parameter in self._parameters if is_partial(parameter.grad)]
        self.places = [place for place, _ in found]
        self._awaited = {id(_local_of(parameter.grad)): (place, parameter) for place, parameter in found}
        if found and self not in _watching:
            _watching.add(self)
            _install()

    def know(self, place: int, norm: Any) -> None:
        """Take the norm of the whole gradient; the first one since backward counts."""
        self.norms.setdefault(place, norm)

    def pass_by(self, part: Tensor, placements: Sequence[Any], result: Tensor) -> None:
        """Torch has spread a tensor anew."""
        place, parameter = self._awaited.get(id(part), (-1, None))
        if parameter is None or place in self.norms or tuple(placements) != tuple(parameter.placements):  # type: ignore[attr-defined]
            return
        if _local_of(parameter.grad) is part:
            with torch.no_grad():
                norm = torch.linalg.vector_norm(flat(result.detach()), dtype=torch.float64)
            self.know(place, float(norm) if on_host(norm) else norm)

    def close(self) -> None:
        """Wait for nothing any more."""
        self._awaited = {}
        _watching.discard(self)
        if not _watching:
            _restore()


def may_be_partial(parameter: nn.Parameter) -> bool:
    """Whether the gradient of a parameter can be a sum over ranks: copies of it are on several."""
    return is_dtensor(parameter) and any(
        placement.is_replicate() and parameter.device_mesh.size(dim) > 1  # type: ignore[attr-defined]
        for dim, placement in enumerate(parameter.placements)  # type: ignore[attr-defined]
    )


def is_copy(parameter: Any) -> bool:
    """Whether each rank of a DTensor's mesh has all of it."""
    return all(placement.is_replicate() for placement in parameter.placements)


def term(gradient: Any) -> Tensor | None:
    """What this rank adds to a gradient of which every rank has a sum or a copy; None where another's copy counts.

    Raises:
        NotImplementedError: The gradient is in parts besides, or is to be reduced in another way than by a sum.
    """
    for placement in gradient.placements:
        if not placement.is_replicate() and getattr(placement, "reduce_op", "") not in ("sum", "avg"):
            raise NotImplementedError(f"a gradient with placements {gradient.placements}")
    if ranks_of(gradient)[0] != int(gradient.device_mesh.mesh.min()):
        return None
    averaged = [
        gradient.device_mesh.size(dim)
        for dim, placement in enumerate(gradient.placements)
        if getattr(placement, "reduce_op", "") == "avg"
    ]
    return flat(_local_of(gradient)) / functools.reduce(lambda a, b: a * b, averaged, 1)


def _local_of(gradient: Any) -> Any:
    return gradient._local_tensor


_watching: weakref.WeakSet[Sums] = weakref.WeakSet()
_originals: list[tuple[Any, Callable[..., Tensor]]] = []


def _install() -> None:
    if _originals:
        return
    for name in _MODULES:
        module = sys.modules.get(name)
        original = getattr(module, _NAME, None)
        if original is not None:
            _originals.append((module, original))
            setattr(module, _NAME, _tap(original))


def _restore() -> None:
    while _originals:
        module, original = _originals.pop()
        setattr(module, _NAME, original)


def _tap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def redistribute(local_tensor: Tensor, current_spec: Any, target_spec: Any, *args: Any, **kwargs: Any) -> Tensor:
        result = original(local_tensor, current_spec, target_spec, *args, **kwargs)
        with contextlib.suppress(Exception):  # a norm that is missing is said to be; the training goes on
            for sums in tuple(_watching):
                sums.pass_by(local_tensor, target_spec.placements, result)
        return result

    return redistribute
