"""Applies decisions to a torch optimizer: scales and clips gradients, skips a step, scales the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def scale_gradients(grads: Sequence[Tensor], scale: Any) -> None:
    """Multiply gradients in place by one number, or each by its own; those with factor 1 are not touched."""
    if np.ndim(scale) == 0:
        if float(scale) != 1.0:
            _multiply(list(grads), [float(scale)] * len(grads))
        return
    touched = [(grad, float(factor)) for grad, factor in zip(grads, scale, strict=True) if float(factor) != 1.0]
    if touched:
        _multiply([grad for grad, _ in touched], [factor for _, factor in touched])


def _multiply(grads: list[Tensor], factors: list[float]) -> None:
    if any(grad.is_sparse for grad in grads):
        for grad, factor in zip(grads, factors, strict=True):
            grad.mul_(factor)
    else:
        torch._foreach_mul_(grads, factors)


@torch.no_grad()
def clip_values(grads: Sequence[Tensor], limit: float) -> None:
    """Limit each element to [-limit, limit], in place."""
    for grad in grads:
        target = grad.coalesce().values() if grad.is_sparse else grad
        if target.is_complex():
            target = torch.view_as_real(target)
        target.clamp_(-limit, limit)


class Skip:
    """Hides the gradients of an optimizer for one step: it passes over parameters without gradient.

    So parameters, momenta and step counters stay as they are, with every optimizer of torch, fused or not.

    Args:
        parameters: The parameters that the optimizer holds.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._hidden = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in self._hidden:
            parameter.grad = None

    def undo(self) -> None:
        """Give the gradients back."""
        for parameter, grad in self._hidden:
            parameter.grad = grad
        self._hidden = []


class ScaledLR:
    """Scales the learning rates of an optimizer for one step; no scheduler ever sees the factor.

    Args:
        optimizer: Its groups' `lr` may be numbers or tensors.
        factor: What to multiply by.
    """

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        self._saved = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, lr in self._saved:
            group["lr"] = lr * factor

    def undo(self) -> None:
        """Put the learning rates back exactly."""
        for group, lr in self._saved:
            group["lr"] = lr
        self._saved = []
