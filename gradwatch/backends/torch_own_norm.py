"""The norm of the gradients that one rank computed, before they are averaged with those of the others."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.backends.torch_device import beside, on_host
from gradwatch.backends.torch_norms import flat


class OwnNorm:
    """Measures each gradient as it arrives, which is before DistributedDataParallel reduces it.

    Args:
        parameters: Whose gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._squares: dict[int, Any] = {}
        reference = weakref.ref(self)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_hook(reference, place))
            for place, parameter in enumerate(parameters)
            if parameter.requires_grad and parameter.is_leaf
        ]

    @torch.no_grad()
    def take(self, place: int, tensor: Tensor) -> None:
        """A gradient has arrived."""
        if tensor.grad is not None:
            self._squares[place] = torch.linalg.vector_norm(flat(tensor.grad), dtype=torch.float64).square()

    def norm(self) -> Any:
        """Of the last backward pass, over all parameters; on an accelerator a scalar tensor that nobody waits for."""
        squares = list(self._squares.values())
        if not squares:
            return 0.0
        norm = torch.stack([beside(square, squares[0]) for square in squares]).sum().sqrt()
        return float(norm) if on_host(norm) else norm

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _hook(reference: weakref.ref[OwnNorm], place: int) -> Callable[[Tensor], None]:
    def arrived(tensor: Tensor) -> None:
        if (own := reference()) is not None:
            own.take(place, tensor)

    return arrived
