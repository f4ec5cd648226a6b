"""Skipping a step."""

from __future__ import annotations

from typing import Any

from gradwatch.actions.base import Array, InStepAction, InStepDecision, Namespace, require_count, require_positive
from gradwatch.errors import ConfigurationError
from gradwatch.records import Floats


class SkipStep(InStepAction):
    """Leave parameters, optimizer state and step counters as if the batch had not been there.

    A step is skipped when the global gradient norm is not finite, and with `factor` also when it exceeds `factor` times
    its running mean (an exponential moving average over `window` accepted steps, bias-corrected as in Kingma and Ba
    2015, Adam, section 3). After `max_in_row` skipped steps the next is taken whatever it is: a run in which every step
    is skipped stands still, and skipping for ever would hide it.

    Args:
        factor: Skip above this multiple of the running mean; None skips only what is not finite.
        window: Length of the running mean, in steps.
        warmup: Accepted steps before `factor` counts.
        max_in_row: Steps in a row that are skipped at most.

    Examples:
        >>> import numpy as np
        >>> skip = SkipStep()
        >>> bool(skip.decide(np.array([1.0, np.nan]), skip.initial_state(), np).skip)
        True
    """

    def __init__(
        self, factor: float | None = None, *, window: int = 100, warmup: int = 20, max_in_row: int = 100
    ) -> None:
        if factor is not None and require_positive("factor", factor) <= 1.0:
            raise ConfigurationError.of("factor", "> 1", factor)
        self.factor = factor
        self.window = require_count("window", window)
        self.warmup = require_count("warmup", warmup)
        self.max_in_row = require_count("max_in_row", max_in_row)

    def initial_state(self) -> tuple[float | Floats, ...]:
        """Steps skipped in a row; with `factor` also the moving average, its weight, and the steps accepted."""
        return (0.0,) if self.factor is None else (0.0, 0.0, 0.0, 0.0)

    def decide(self, norms: Array, state: tuple[Array, ...], xp: Namespace) -> InStepDecision:
        """See `InStepAction.decide`."""
        norm = xp.sqrt(xp.sum(norms * norms))
        skip = ~xp.isfinite(norm)
        if self.factor is not None:
            _, mean, weight, accepted = state
            typical = mean / xp.maximum(weight, 1e-30)
            skip = skip | ((accepted >= self.warmup) & (norm > self.factor * typical))
        skip = skip & (state[0] < self.max_in_row)
        in_row = xp.where(skip, state[0] + 1.0, 0.0)
        if self.factor is None:
            return InStepDecision(skip=skip, state=(in_row,))
        decay = 1.0 - 1.0 / self.window
        learnt = (decay * mean + (1.0 - decay) * norm, decay * weight + (1.0 - decay), accepted + 1.0)
        teaches = ~skip & xp.isfinite(norm)
        kept = (xp.where(teaches, new, old) for new, old in zip(learnt, (mean, weight, accepted), strict=True))
        return InStepDecision(skip=skip, state=(in_row, *kept))

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {
            "factor": self.factor,
            "window": self.window,
            "warmup": self.warmup,
            "max_in_row": self.max_in_row,
        }
