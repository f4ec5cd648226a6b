"""The losses of the published cases, as Keras computes them, and what the best constant prediction would cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

#: Keras clips probabilities to [EPSILON, 1 - EPSILON] in its cross-entropies.
EPSILON = 1e-7

Array = npt.NDArray[np.float64]
#: Output of the network, targets, number of samples in the whole set.
Loss = Callable[[Any, Tensor, int], Tensor]


def bce(output: Tensor, target: Tensor, count: int) -> Tensor:
    """Keras `binary_crossentropy` of probabilities."""
    p = output.clamp(EPSILON, 1 - EPSILON)
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


def cce(output: Tensor, target: Tensor, count: int) -> Tensor:
    """Keras `categorical_crossentropy` of probabilities, which it renormalises first."""
    p = (output / output.sum(1, keepdim=True)).clamp(EPSILON, 1 - EPSILON)
    return -(target * p.log()).sum(1).mean()


def cce_logits(output: Tensor, target: Tensor, count: int) -> Tensor:
    """Cross-entropy of logits."""
    return -(target * F.log_softmax(output, 1)).sum(1).mean()


def cce_raw_sum(output: Tensor, target: Tensor, count: int) -> Tensor:
    """The first TensorFlow tutorials: sum over the batch of y log(softmax), unclipped."""
    return -(target * F.softmax(output, 1).log()).sum()


def unbounded_log(output: Tensor, target: Tensor, count: int) -> Tensor:
    """Cross-entropy by hand on an output that need not lie in (0, 1)."""
    return (-target * output.log() - (1 - target) * (1 - output).log()).sum(1).mean()


def mse(output: Tensor, target: Tensor, count: int) -> Tensor:
    return (output - target).square().mean()


def mae(output: Tensor, target: Tensor, count: int) -> Tensor:
    return (output - target).abs().mean()


def mse_sum(output: Tensor, target: Tensor, count: int) -> Tensor:
    return (output - target).square().sum()


def half_mse_sum_T(  # noqa: N802 - as the specifications call it
    output: Tensor, target: Tensor, count: int
) -> Tensor:
    return (output - target).square().sum() / (2 * count)


def smooth_l1(output: Tensor, target: Tensor, count: int) -> Tensor:
    return F.smooth_l1_loss(output, target)


def vae(output: tuple[Tensor, Tensor, Tensor], target: Tensor, count: int) -> Tensor:
    """Kingma & Welling 2014: reconstruction plus divergence, summed over the batch. The target is the input."""
    picture, mean, log_variance = output
    reconstruction = F.binary_cross_entropy(picture.clamp(EPSILON, 1 - EPSILON), target, reduction="sum")
    return reconstruction - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (bce, cce, cce_logits, cce_raw_sum, unbounded_log, mse, mae, mse_sum, half_mse_sum_T, smooth_l1, vae)
}


def constant_loss(name: str, targets: Array, batch: int) -> float | None:
    """The loss of the best constant predictor; None where that is not defined.

    Args:
        name: Key of `LOSSES`.
        targets: Shape (n, k).
        batch: Batch size, which scales the summed losses.
    """
    mean = targets.mean(0)
    variance = float(targets.var(0).mean())
    formulas: Mapping[str, Callable[[], float]] = {
        "mse": lambda: variance,
        "mse_sum": lambda: variance * min(batch, len(targets)),
        "half_mse_sum_T": lambda: variance / 2,
        "mae": lambda: float(np.abs(targets - np.median(targets, 0)).mean()),
        "bce": lambda: _binary_entropy(np.clip(mean, EPSILON, 1 - EPSILON)),
        "cce": lambda: _entropy(mean),
        "cce_logits": lambda: _entropy(mean),
        "cce_raw_sum": lambda: _entropy(mean) * batch,
    }
    return formulas[name]() if name in formulas else None


def _entropy(p: Array) -> float:
    return float(-(p * np.log(p)).sum())


def _binary_entropy(p: Array) -> float:
    return float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean())


def accuracy(name: str, output: Tensor, target: Tensor) -> float | None:
    """Share of right answers where the targets are classes; None for a regression."""
    if target.ndim == 2 and target.shape[1] > 1 and bool((target.sum(1) == 1).all()):
        return float((output.argmax(1) == target.argmax(1)).float().mean())
    if name in ("bce", "mae") and bool(((target == 0) | (target == 1)).all()):
        return float(((output > 0.5) == (target > 0.5)).float().mean())
    return None
