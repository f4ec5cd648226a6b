"""Statistics that are sampled every few steps: weights, updates, extremes, zeros and non-finite elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradwatch.backends.torch_norms import CpuNorms, device_norms, values
from gradwatch.records import NOT_MEASURED, Floats


def tensor_norms(tensors: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """L2 norms of tensors on whatever devices, shape (number of tensors,)."""
    norms = np.empty(len(tensors), np.float32)
    for device in {tensor.device for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        chosen = [tensors[i] for i in places]
        norms[places] = CpuNorms(chosen)(chosen) if device.type == "cpu" else device_norms(chosen).cpu().numpy()
    return norms


@torch.no_grad()
def gradient_statistics(grads: Mapping[int, Tensor], count: int, *, scale: float = 1.0) -> dict[str, Floats]:
    """Largest magnitude, share of exact zeros and number of non-finite elements of each gradient.

    Args:
        grads: Place to gradient.
        count: Number p of parameters.
        scale: Loss scale that the gradients carry.

    Returns:
        `grad_max`, `zero_fraction` and `nonfinite_count`, each of shape (p,); `NOT_MEASURED` without gradient.
        `grad_max` is that of the finite elements.
    """
    found = {name: np.full(count, NOT_MEASURED, np.float32) for name in ("grad_max", "zero_fraction", "nonfinite_count")}
    for place, grad in grads.items():
        flat = values(grad).reshape(-1)
        if not len(flat):
            continue
        low, high = torch.aminmax(flat)
        largest = torch.maximum(-low, high).float()
        bad = 0.0
        if not torch.isfinite(largest):
            finite = torch.isfinite(flat)
            bad = float(len(flat) - finite.sum())
            largest = torch.where(finite, flat.abs(), 0).max().float()
        found["grad_max"][place] = float(largest) / scale
        found["zero_fraction"][place] = 1.0 - float(torch.count_nonzero(flat)) / len(flat)
        found["nonfinite_count"][place] = bad
    return found


class Updates:
    """Measures ‖Δw‖/‖w‖ across one optimizer step.

    Args:
        places: Places of the parameters that the optimizer holds.
        parameters: Those parameters.
    """

    @torch.no_grad()
    def __init__(self, places: Sequence[int], parameters: Sequence[nn.Parameter]) -> None:
        self._places, self._parameters = list(places), list(parameters)
        self._before = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def finish(self, count: int) -> dict[str, Floats]:
        """`weight_norm` after the step and `update_ratio`, each of shape (`count`,)."""
        now = [parameter.detach() for parameter in self._parameters]
        weight_norm = np.full(count, NOT_MEASURED, np.float32)
        update_ratio = np.full(count, NOT_MEASURED, np.float32)
        weights = tensor_norms(now)
        torch._foreach_sub_(self._before, now)
        weight_norm[self._places] = weights
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = tensor_norms(self._before) / weights
        update_ratio[self._places] = np.where(weights > 0, ratio, NOT_MEASURED)
        return {"weight_norm": weight_norm, "update_ratio": update_ratio}
