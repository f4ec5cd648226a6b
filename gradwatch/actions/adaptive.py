"""Clipping by a limit that follows the run's own gradient norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gradwatch.actions.base import Array, InStepAction, InStepDecision, Namespace, require_count, require_positive
from gradwatch.actions.clip import EPSILON
from gradwatch.errors import ConfigurationError
from gradwatch.records import Floats


class ZClip(InStepAction):
    """Clip a global norm that stands out from its own running mean (Kumar et al. 2025, ZClip, arXiv 2504.02507).

    With the running mean m and variance v of the norm g and the score z = (g - m) / (sqrt(v) + 1e-6), a norm with
    z > `threshold` is clipped to m + threshold² / z · sqrt(v): the further out, the nearer to the mean. Mean and
    variance start from the first `warmup` norms and then follow, as exponential moving averages, the clipped norms.

    Args:
        threshold: Score above which a norm is a spike.
        alpha: Weight of the past in the moving averages.
        warmup: Steps that only feed the averages.
        max_norm: A further limit that holds at all steps; the authors' code sets 1.0, the paper's method has none.

    Examples:
        >>> import numpy as np
        >>> clip, state = ZClip(warmup=3), ZClip(warmup=3).initial_state()
        >>> for norm in (1.0, 1.2, 0.8, 50.0):
        ...     decision = clip.decide(np.array([norm]), state, np)
        ...     state = decision.state
        >>> round(float(50.0 * decision.scale), 3)
        1.003
    """

    def __init__(
        self, threshold: float = 2.5, *, alpha: float = 0.97, warmup: int = 25, max_norm: float | None = None
    ) -> None:
        self.threshold = require_positive("threshold", threshold)
        if require_positive("alpha", alpha) >= 1.0:
            raise ConfigurationError.of("alpha", "< 1", alpha)
        self.alpha = alpha
        self.warmup = require_count("warmup", warmup, least=2)
        self.max_norm = None if max_norm is None else require_positive("max_norm", max_norm)

    def initial_state(self) -> tuple[float | Floats, ...]:
        """Number of norms seen, their mean and their variance."""
        return (0.0, 0.0, 0.0)

    def decide(self, norms: Array, state: tuple[Array, ...], xp: Namespace) -> InStepDecision:
        """See `InStepAction.decide`."""
        seen, mean, variance = state
        norm = xp.sqrt(xp.sum(norms * norms))
        is_finite = xp.isfinite(norm)
        norm = xp.where(is_finite, norm, mean)
        std = xp.sqrt(variance)
        z = (norm - mean) / (std + EPSILON)
        spike = (seen >= self.warmup) & (z > self.threshold)
        kept = xp.where(spike, mean + self.threshold**2 * std / xp.maximum(z, self.threshold), norm)
        limit = kept if self.max_norm is None else xp.minimum(kept, self.max_norm)
        return InStepDecision(
            scale=xp.where(norm > limit, limit / (norm + EPSILON), 1.0),
            state=_if(is_finite, self._learnt(kept, state, xp), state, xp),
        )

    def _learnt(self, norm: Array, state: tuple[Array, ...], xp: Namespace) -> tuple[Array, ...]:
        seen, mean, variance = state
        is_warm = seen >= self.warmup
        # Plain mean and variance while warming up (Welford), moving averages afterwards.
        share = xp.where(is_warm, 1.0 - self.alpha, 1.0 / (seen + 1.0))
        new_mean = mean + share * (norm - mean)
        deviation = xp.where(is_warm, norm - new_mean, norm - mean)
        return seen + 1.0, new_mean, variance + share * (deviation * (norm - new_mean) - variance)

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {"threshold": self.threshold, "alpha": self.alpha, "warmup": self.warmup, "max_norm": self.max_norm}


class AutoClip(InStepAction):
    """Clip to a percentile of the global norms seen so far, this one included (Seetharaman et al. 2020, AutoClip).

    Args:
        percentile: Between 0 and 100; the paper uses 10.
        history: Norms that are remembered; the paper keeps all, this many are enough and cost a fixed time.

    Examples:
        >>> import numpy as np
        >>> clip, state = AutoClip(percentile=50), AutoClip(percentile=50).initial_state()
        >>> for norm in (1.0, 2.0, 9.0):
        ...     decision = clip.decide(np.array([norm]), state, np)
        ...     state = decision.state
        >>> round(float(9.0 * decision.scale), 3)
        2.0
    """

    def __init__(self, percentile: float = 10.0, *, history: int = 1000) -> None:
        if not 0 < require_positive("percentile", percentile) <= 100:
            raise ConfigurationError.of("percentile", "in (0, 100]", percentile)
        self.percentile = percentile
        self.history = require_count("history", history, least=2)

    def initial_state(self) -> tuple[float | Floats, ...]:
        """The last norms, infinity where none was seen yet, and their number."""
        return (np.full(self.history, math.inf), 0.0)

    def decide(self, norms: Array, state: tuple[Array, ...], xp: Namespace) -> InStepDecision:
        """See `InStepAction.decide`."""
        past, seen = state
        norm = xp.sqrt(xp.sum(norms * norms))
        is_finite = xp.isfinite(norm)
        norm = xp.where(is_finite, norm, 0.0)
        remembered = xp.concatenate((past[1:], xp.reshape(norm, (1,))))
        count = xp.minimum(seen + 1.0, self.history)
        limit = _percentile(xp.sort(remembered), count, self.percentile / 100.0, xp)
        return InStepDecision(
            scale=xp.minimum(limit / (norm + EPSILON), 1.0), state=_if(is_finite, (remembered, count), state, xp)
        )

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {"percentile": self.percentile, "history": self.history}


def _percentile(ordered: Array, count: Array, share: float, xp: Namespace) -> Array:
    """Linear interpolation between the two of the first `count` numbers that lie around the place `share`."""
    place = share * (count - 1.0)
    ranks = xp.cumsum(xp.ones_like(ordered)) - 1.0
    # The weight of rank r is the hat function max(0, 1 - |r - place|): no indexing by a traced number.
    weights = xp.maximum(1.0 - xp.sqrt((ranks - place) ** 2), 0.0)
    return xp.sum(weights * xp.where(weights > 0, ordered, 0.0))


def _if(condition: Array, new: tuple[Array, ...], old: tuple[Array, ...], xp: Namespace) -> tuple[Array, ...]:
    """The new state where the condition holds: a step that is not finite teaches nothing."""
    return tuple(xp.where(condition, after, before) for after, before in zip(new, old, strict=True))
