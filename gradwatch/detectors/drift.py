"""A layer whose gradient grows or shrinks steadily while the others do not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.detectors import wording
from gradwatch.detectors.memory import Kept, Mask, PerLayer, Remembers
from gradwatch.detectors.trend import BLOCKS, LEAST_LAYERS, WINDOW, Trend

if TYPE_CHECKING:
    from gradwatch.detectors.signals import Signals

#: A drift must be this many times as steep as slopes usually are in this run.
UNUSUAL = 2.0
#: What is usual is forgotten by 3 % each time the trend is renewed.
FORGET = 0.97
#: Renewals of the trend for which a layer must drift: while slopes of early training are not yet known, and afterwards.
EARLY_PATIENCE = 6
PATIENCE = 2


class Drift(Remembers):
    """Which layers drift, in one direction.

    A drifting layer leaves the median layer, and moves in that direction outright: not only because the others move
    away. Early in training layers find their level in straight lines too; so the slope is held against the steepest
    that this run has usually had up to the window, and while that is not known a drift must last longer.

    Attributes:
        active: bool array of shape (l,).
        any: Whether any layer drifts.
        holds: Whether any layer seemed to drift when the trend was renewed last.
        usual: The steepest slope of a layer that does not drift, fading, from before the window; nats per step.
    """

    active = PerLayer(False)
    any = Kept(False)
    held = PerLayer(0)
    holds = Kept(False)
    usual = Kept(0.0)
    recent = Kept[list[float]]([])
    renewals = Kept(0)

    def follow(self, trend: Trend, *, growth: float, rise: float, certainty: float) -> None:
        """Take the renewed trend; negative `growth` looks for decay."""
        self.renewals += 1
        steepest = max(trend.highest, -trend.lowest)
        top = trend.highest if growth > 0 else -trend.lowest
        if self.holds or top >= max(abs(growth), UNUSUAL * self.usual):
            candidates = self._candidates(trend, math.copysign(1.0, growth), abs(growth), rise, certainty)
            self.held = np.where(candidates, self.held + 1, 0)
            self.active = self.held >= (PATIENCE if self.renewals > 2 * BLOCKS else EARLY_PATIENCE)
            self.any, self.holds = bool(self.active.any()), bool(candidates.any())
            steepest = float(np.fmax.reduce(np.where(candidates, 0.0, np.abs(trend.slope)), initial=0.0))
        self.recent.append(steepest)
        if len(self.recent) > BLOCKS:
            self.usual = max(FORGET * self.usual, self.recent.pop(0))

    def _candidates(self, trend: Trend, sign: float, growth: float, rise: float, certainty: float) -> Mask:
        slope = sign * trend.slope
        found: Mask = slope >= max(growth, UNUSUAL * self.usual)
        if found.any():
            change = slope * WINDOW
            found &= (change >= rise) & (slope >= certainty * trend.error)
            found &= np.minimum(sign * trend.early, sign * trend.late) >= 0.3 * change
        if self.any:
            found |= self.active & (slope >= 0.75 * growth) & (slope >= 0.5 * certainty * trend.error)
        if found.any():
            found &= slope + sign * trend.common >= 0.5 * growth
        return found


def facts(slope: float, now: Signals, layers: Mask) -> dict[str, Any]:
    """What a drift of these layers at this slope means, and when the first of them overflows its data type."""
    trend = now.trend
    return {
        "sign": "drift",
        "drifted": True,
        "per_step": math.expm1(slope),
        "over_steps": WINDOW,
        "factor": math.exp(slope * WINDOW),
        "relative": len(layers) >= LEAST_LAYERS,
        "doubling_steps": math.log(2) / slope if slope > 0 else None,
        "halving_steps": -math.log(2) / slope if slope < 0 else None,
        "overflow_steps": _overflow(now, layers) if slope > 0 else None,
        "norm": wording.exp(float(np.fmax.reduce(trend.blocks[-1][layers] + trend.course[-1], initial=-math.inf))),
    }


def _overflow(now: Signals, layers: Mask) -> float | None:
    """Steps until the first of these layers' norms leaves the range of its data type; None when they do not grow."""
    trend = now.trend
    names = now.context.layers.names
    half = {p.layer for p in now.context.parameters if p.dtype == "float16"}
    limits = np.array([math.log(65504.0 if name in half else 3.4e38) for name in names])
    speed = trend.slope + trend.common
    left = (limits - trend.blocks[-1] - trend.course[-1])[layers & (speed > 0)] / speed[layers & (speed > 0)]
    return float(np.ceil(left.min())) if len(left) else None
