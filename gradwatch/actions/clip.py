"""Gradient clipping."""

from __future__ import annotations

from typing import Any

from gradwatch.actions.base import Array, InStepAction, InStepDecision, Namespace, require_positive
from gradwatch.errors import ConfigurationError

#: torch.nn.utils.clip_grad_norm_ adds this to the norm; so do we, to give the same parameters.
EPSILON = 1e-6


class Clip(InStepAction):
    """Clip gradients by global norm, by the norm of each parameter, or by value.

    Exactly one of the three is given. The record keeps the norms before clipping.

    Args:
        max_norm: Scale all gradients by min(1, max_norm / (global norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`
            does (Pascanu, Mikolov and Bengio 2013, On the difficulty of training recurrent neural networks, section
            3.2).
        per_layer: Scale the gradient of each parameter by min(1, per_layer / (its norm + 1e-6)).
        value: Limit each element to [-value, value]; changes the direction.

    Examples:
        >>> import numpy as np
        >>> float(Clip(max_norm=1.0).decide(np.array([3.0, 4.0]), (), np).scale.round(6))
        0.2
    """

    def __init__(
        self, max_norm: float | None = None, *, per_layer: float | None = None, value: float | None = None
    ) -> None:
        given = {"max_norm": max_norm, "per_layer": per_layer, "value": value}
        chosen = {name: limit for name, limit in given.items() if limit is not None}
        if len(chosen) != 1:
            raise ConfigurationError(f"Clip takes exactly one of 'max_norm', 'per_layer' and 'value': {chosen}")
        for name, limit in chosen.items():
            require_positive(name, limit)
        self.max_norm, self.per_layer, self.clip_value = max_norm, per_layer, value

    def decide(self, norms: Array, state: tuple[Array, ...], xp: Namespace) -> InStepDecision:
        """See `InStepAction.decide`."""
        if self.max_norm is not None:
            return InStepDecision(scale=xp.minimum(self.max_norm / (xp.sqrt(xp.sum(norms * norms)) + EPSILON), 1.0))
        if self.per_layer is not None:
            return InStepDecision(scale=xp.minimum(self.per_layer / (norms + EPSILON), 1.0))
        return InStepDecision()

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        given = {"max_norm": self.max_norm, "per_layer": self.per_layer, "value": self.clip_value}
        return {name: limit for name, limit in given.items() if limit is not None}
