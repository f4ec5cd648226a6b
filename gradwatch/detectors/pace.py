"""How fast the weights move: the learning rate's course and the sampled ratio of update to weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.memory import FloatArray, Kept, Mask, PerLayer, PerParameter, Remembers
from gradwatch.records import NOT_MEASURED, Floats

#: A weight that was zero has no ratio; above this it is taken for one.
ABSURD = 1e6
#: Memory of the learning rate's mean: about 20 steps.
MEMORY = 0.05
#: A weight that moved this many times further than its updates were did not move by them.
OUTSIDE = 100.0
#: A learning rate above all that were in force until so many steps ago is new territory.
TERRITORY = 20
#: A learning rate that held for so many steps is where a later rise begins.
LEVEL = 10


class Pace(Remembers):
    """The learning rate and the last two samples of the update ratio, matrices only (biases start at zero).

    Attributes:
        rate: Learning rate in force; NaN while unknown.
        growth: Its growth, nats per step, over about the last 20 steps; 0 while it is constant or unknown.
        base, base_step: The scheduler's rate before it last began to rise, and the last step with it.
        idle: Steps in a row with a rate of exactly 0.
        ratio: ‖Δw‖/‖w‖ per layer at the last sample, shape (l,); NaN where unknown.
        total, previous: The same over all layers, at the last sample and the one before; NaN while unknown.
        top_rate: The highest learning rate until 20 steps ago.
        weight_norm: Last sample per parameter, shape (p,).
        first_zero: Matrices that were all zero at the first sample, shape (p,).
        update: Last sampled norm of each parameter's update, shape (p,).
        replaced: Parameters whose norm changed between two samples far more than the updates at both could make it,
            shape (p,); `replaced_at` are the steps of these samples.
        fresh: Whether this step brought one.
    """

    rate = Kept(math.nan)
    mean_rate = Kept(math.nan)
    growth = Kept(0.0)
    base = Kept(math.nan)
    base_step = Kept(0)
    given = Kept(math.nan)
    level = Kept(0)
    idle = Kept(0)
    rates = Kept[list[float]]([])
    top_rate = Kept(0.0)
    ratio = PerLayer(math.nan)
    total = Kept(math.nan)
    previous = Kept(math.nan)
    weight_norm = PerParameter(math.nan)
    first_zero = PerParameter(False)
    update = PerParameter(math.nan)
    replaced = PerParameter(False)
    replaced_at = Kept([0, 0])
    sampled_at = Kept(0)
    looked = Kept(False)
    fresh = Kept(False)

    def prepare(self, context: RunContext) -> None:
        """See `Remembers.prepare`."""
        self.matrices = _matrices(context)

    @property
    def new_territory(self) -> bool:
        """Whether the learning rate is rising above all that the run has stood so far."""
        return self.growth > 0.002 and self.rate > 1.05 * self.top_rate > 0

    @property
    def spread(self) -> float:
        """Largest over smallest update ratio of the layers at the last sample; NaN while not known."""
        ratios = self.ratio[self.ratio >= 0]
        return float(ratios.max() / ratios.min()) if len(ratios) > 1 and ratios.min() > 0 else math.nan

    def schedule(self, given: float, step: int) -> None:
        """Take the scheduler's own learning rate at a step: where it begins to rise is what made it too high."""
        self.level = self.level + 1 if given == self.given else 0
        if not given >= self.given or self.level >= LEVEL:  # true of NaN
            self.base, self.base_step = given, step
        self.given = given

    def add(self, rate: float, samples: Mapping[str, Floats], step: int) -> None:
        """Take the learning rate in force and the statistics of a step."""
        self.rate = rate
        self.idle = self.idle + 1 if rate == 0 else 0
        if rate > 0:
            log = math.log(rate)
            if math.isnan(self.mean_rate):
                self.mean_rate = log
            lag = log - self.mean_rate
            self.growth = lag * MEMORY / (1 - MEMORY)
            self.mean_rate += MEMORY * lag
            self.rates.append(rate)
            if len(self.rates) > TERRITORY:
                self.top_rate = max(self.top_rate, self.rates.pop(0))
        self.fresh = False
        weights, ratios = samples.get("weight_norm"), samples.get("update_ratio")
        if weights is not None:
            if ratios is not None:
                self._compare(np.asarray(weights, dtype=np.float64), np.asarray(ratios, dtype=np.float64), step)
            np.copyto(self.weight_norm, weights, where=weights != NOT_MEASURED)
            if not self.looked:
                self.first_zero, self.looked = self.matrices & (self.weight_norm == 0.0), True
            if ratios is not None:
                self._sample(np.asarray(weights, dtype=np.float64), np.asarray(ratios, dtype=np.float64))

    def _compare(self, weights: FloatArray, ratios: FloatArray, step: int) -> None:
        """Find weights that something other than the optimizer has changed since the last sample."""
        known = (weights != NOT_MEASURED) & (ratios != NOT_MEASURED) & (ratios < ABSURD)
        with np.errstate(invalid="ignore", over="ignore"):
            update = np.where(known, weights * ratios, math.nan)
            most = OUTSIDE * max(1, step - self.sampled_at) * np.fmax(self.update, update)
            outside = known & (np.abs(weights - self.weight_norm) > np.maximum(most, self.weight_norm))
        if outside.any():
            self.replaced, self.replaced_at = outside, [self.sampled_at, step]
        self.update, self.sampled_at = update, step

    def _sample(self, weights: FloatArray, ratios: FloatArray) -> None:
        with np.errstate(invalid="ignore"):
            known = self.matrices & (ratios != NOT_MEASURED) & (weights != NOT_MEASURED) & (ratios < ABSURD)
            known &= np.isfinite(weights) & (weights < 1e150)
        if not known.any():
            return
        squares = np.where(known, weights, 0.0) ** 2
        moved = squares * np.where(known, ratios, 0.0) ** 2
        places, layers = self.context.layers.of_parameter, len(self.context.layers)
        weight = np.bincount(places, squares, layers)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.ratio = np.sqrt(np.bincount(places, moved, layers) / weight)
        total = float(weight.sum())
        self.previous, self.total = self.total, math.sqrt(moved.sum() / total) if total > 0 else math.nan
        self.fresh = True


def _matrices(context: RunContext) -> Mask:
    """Parameters of two or more dimensions; all where no shape is known or there are none."""
    found = np.array([len(p.shape) >= 2 for p in context.parameters], dtype=bool)
    return found if found.any() else np.ones(len(found), dtype=bool)
