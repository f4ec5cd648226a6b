"""Scales gradients unit by unit, for actions that look at each output unit of a layer on its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.actions.base import InStepAction
from gradwatch.backends.torch_device import TorchNamespace, on_host
from gradwatch.backends.torch_norms import values


@torch.no_grad()
def scale_units(action: InStepAction, parameters: Sequence[nn.Parameter], spared: Iterable[Any], norms: Any) -> Any:
    """Multiply the gradient of each unit by what the action says.

    A unit is a slice along the first dimension of a matrix or filter bank, and a vector or scalar as a whole.

    Args:
        action: One whose `by_unit` is true.
        parameters: Whose gradients; sparse ones are passed over.
        spared: Which parameters the action leaves alone.
        norms: L2 norms of the gradients, shape (number of parameters,), numpy or a tensor.

    Returns:
        The norms afterwards, as `norms`.
    """
    after = norms.clone() if isinstance(norms, Tensor) else norms.copy()
    for i, (parameter, is_spared) in enumerate(zip(parameters, spared, strict=True)):
        grad = parameter.grad
        if is_spared or grad is None or grad.layout is not torch.strided or not grad.numel():
            continue
        of_grad = _unit_norms(grad)
        scale = action.unit_scale(of_grad, _unit_norms(parameter.detach()), TorchNamespace)
        if on_host(grad) and bool((scale == 1.0).all()):
            continue
        grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)) if grad.dim() > 1 else scale.view(-1)[0])
        norm = torch.linalg.vector_norm(of_grad * scale)
        after[i] = norm if isinstance(after, Tensor) else float(norm)
    return after


def _unit_norms(tensor: Tensor) -> Tensor:
    rows = values(tensor).reshape(len(tensor), -1) if tensor.dim() > 1 else values(tensor).reshape(1, -1)
    dtype = torch.float64 if rows.dtype is torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms


def spared_by(action: InStepAction, described: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which parameters an action leaves alone."""
    last = max(parameter.depth for parameter in described)
    return np.array([action.spares(parameter, is_last=parameter.depth == last) for parameter in described], bool)
