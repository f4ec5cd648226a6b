"""Adaptive gradient clipping: unit by unit, relative to the weights."""

from __future__ import annotations

from typing import Any, ClassVar

from gradwatch.actions.base import Array, InStepAction, InStepDecision, Namespace, require_positive
from gradwatch.records import Parameter


class AGC(InStepAction):
    """Clip each unit's gradient to a share of the unit's weights.

    Brock et al. 2021, High-Performance Large-Scale Image Recognition Without Normalization, section 4.1. A unit is what
    makes one
    output: a row of a matrix, a filter of a convolution; a vector is one unit. With the norms G of its gradient and W
    of its weights, a unit with G / max(W, eps) > `clip_factor` is scaled so that the ratio is met. The record keeps the
    norms before clipping.

    Args:
        clip_factor: Largest ratio; the paper's 0.01 is for large batches, smaller ones take larger ratios.
        eps: Least weight norm, so that units that start at zero can grow.
        spare_last: Leave the last layer alone, as the paper does with the final linear layer.

    Examples:
        >>> import numpy as np
        >>> AGC(clip_factor=0.1).unit_scale(np.array([1.0, 0.1]), np.array([2.0, 2.0]), np)
        array([0.2, 1. ])
    """

    by_unit: ClassVar[bool] = True

    def __init__(self, clip_factor: float = 0.01, *, eps: float = 1e-3, spare_last: bool = True) -> None:
        self.clip_factor = require_positive("clip_factor", clip_factor)
        self.eps = require_positive("eps", eps)
        self.spare_last = bool(spare_last)

    def decide(self, norms: Array, state: tuple[Array, ...], xp: Namespace) -> InStepDecision:
        """Nothing to decide from whole parameters; see `unit_scale`."""
        return InStepDecision()

    def unit_scale(self, grad_norm: Array, weight_norm: Array, xp: Namespace) -> Array:
        """See `InStepAction.unit_scale`."""
        largest = self.clip_factor * xp.maximum(weight_norm, self.eps)
        return xp.where(grad_norm > largest, largest / xp.maximum(grad_norm, 1e-6), 1.0)

    def spares(self, parameter: Parameter, *, is_last: bool) -> bool:
        """See `InStepAction.spares`."""
        return self.spare_last and is_last

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {"clip_factor": self.clip_factor, "eps": self.eps, "spare_last": self.spare_last}
