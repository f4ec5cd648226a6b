"""Skipping a step."""

from __future__ import annotations

from typing import Any

from gradwatch.actions.base import Array, InStepAction, InStepDecision, Namespace, require_positive
from gradwatch.errors import ConfigurationError


class SkipStep(InStepAction):
    """Leave parameters, optimizer state and step counters as if the batch had not been there.

    A step is skipped when the global gradient norm is not finite, and with `factor` also when it exceeds `factor` times
    its running mean (an exponential moving average over `window` accepted steps, bias-corrected as in Kingma and Ba
    2015, Adam, section 3).

    Args:
        factor: Skip above this multiple of the running mean; None skips only what is not finite.
        window: Length of the running mean, in steps.
        warmup: Accepted steps before `factor` counts.

    Examples:
        >>> import numpy as np
        >>> bool(SkipStep().decide(np.array([1.0, np.nan]), (), np).skip)
        True
    """

    def __init__(self, factor: float | None = None, *, window: int = 100, warmup: int = 20) -> None:
        if factor is not None and require_positive("factor", factor) <= 1.0:
            raise ConfigurationError.of("factor", "> 1", factor)
        if window < 1:
            raise ConfigurationError.of("window", ">= 1", window)
        if warmup < 1:
            raise ConfigurationError.of("warmup", ">= 1", warmup)
        self.factor, self.window, self.warmup = factor, window, warmup

    def initial_state(self) -> tuple[float, ...]:
        """Moving average, its weight, and the number of accepted steps."""
        return (0.0, 0.0, 0.0) if self.factor is not None else ()

    def decide(self, norms: Array, state: tuple[Array, ...], xp: Namespace) -> InStepDecision:
        """See `InStepAction.decide`."""
        norm = xp.sqrt(xp.sum(norms * norms))
        bad = ~xp.isfinite(norm)
        if self.factor is None:
            return InStepDecision(skip=bad)
        mean, weight, accepted = state
        typical = mean / xp.maximum(weight, 1e-30)
        skip = bad | ((accepted >= self.warmup) & (norm > self.factor * typical))
        decay = 1.0 - 1.0 / self.window
        return InStepDecision(
            skip=skip,
            state=(
                xp.where(skip, mean, decay * mean + (1.0 - decay) * norm),
                xp.where(skip, weight, decay * weight + (1.0 - decay)),
                xp.where(skip, accepted, accepted + 1.0),
            ),
        )

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {"factor": self.factor, "window": self.window, "warmup": self.warmup}
