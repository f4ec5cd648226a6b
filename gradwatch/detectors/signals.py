"""What the rules look at, computed once a step for all of them: layer norms, robust baselines, trends, the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.losses import LossCourse
from gradwatch.detectors.memory import Kept, Mask, PerLayer, PerParameter, Remembers
from gradwatch.detectors.trend import Trend
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, Floats, Layers, StepBatch

#: Weight of a new step in the robust baseline: a memory of 50 steps.
BASELINE_WEIGHT = 0.02
#: A baseline never takes a step at more than this many of its spreads (Huber's clipping): a spike hardly moves it.
CLIP = 3.0
#: Least spread of a log norm: 5 %.
LEAST_SPREAD = 0.05


class Signals(Remembers):
    """The state of a run after each step, for the rules to look at.

    Attributes:
        index: Steps seen before this one.
        step: Its number.
        row: Gradient norms of the parameters, shape (p,).
        norms, logs: Norms of the layers, shape (l,), and their logarithms, NaN where absent, zero or not finite.
        present, zero, bad: Masks of layers: has a gradient; it is exactly zero; it is not finite.
        total: Logarithm of the global norm over what is finite; NaN where nothing is.
        level, spread: Robust running mean of `logs` and of its absolute deviation, before this step.
        seen: Finite non-zero gradients so far, shape (l,).
        loss: The loss of this step; NaN where not known.
        skipped: Why the optimizer did not step, or "".
        samples: Statistics taken at this step, name to row.
    """

    index = Kept(0)
    level = PerLayer(math.nan)
    spread = PerLayer(0.0)
    seen = PerLayer(0)
    ever = PerParameter(False)
    weight_norm = PerParameter(math.nan)
    update_ratio = PerParameter(math.nan)
    first_total = Kept(math.nan)
    total_level = Kept(math.nan)
    total_spread = Kept(0.0)
    total_seen = Kept(0)
    lr = Kept(math.nan)

    def __init__(self) -> None:
        self.course = LossCourse()
        self.trend = Trend()

    def begin(self, context: RunContext) -> None:
        """Forget everything and prepare for the parameters of `context`."""
        super().begin(context)
        self.course.begin(context)
        self.trend.begin(context)
        self._shape(context)

    def grow(self, context: RunContext) -> None:
        """Go on with more parameters."""
        super().grow(context)
        self.course.grow(context)
        self.trend.grow(context)
        self._shape(context)

    def remembered(self) -> dict[str, Any]:
        """A copy of all state."""
        return {**super().remembered(), "course": self.course.remembered(), "trend": self.trend.remembered()}

    def recall(self, state: Mapping[str, Any]) -> None:
        """Go on from what `remembered` gave."""
        super().recall(state)
        self.course.recall(state["course"])
        self.trend.recall(state["trend"])

    def _shape(self, context: RunContext) -> None:
        self.layers: Layers = context.layers
        self.matrices: Mask = np.array([len(p.shape) >= 2 or not p.shape for p in context.parameters], dtype=bool)

    def advance(self, batch: StepBatch) -> Iterator[Signals]:
        """Look at each step of the batch in turn; yields itself, `settle` to be called before the next."""
        losses = batch.metrics.get("loss")
        rates = batch.metrics.get("lr")
        factors = batch.metrics.get("lr_factor")
        self.modules = batch.modules
        sampled = _sampled(batch)
        norms = self.layers.norms(batch.grad_norm)
        absent, zero = norms == NOT_MEASURED, norms == 0.0
        bad = ~np.isfinite(norms) & ~absent
        none = absent | zero | bad
        clean = ~none.any(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(norms)
        logs[none] = math.nan
        power = np.where(none, 0.0, norms)
        totals = np.sqrt(np.einsum("ij,ij->i", power, power))
        for i, step in enumerate(batch.step.tolist()):
            self.step = step
            self.row = batch.grad_norm[i]
            self.norms, self.logs, self.zero, self.bad = norms[i], logs[i], zero[i], bad[i]
            self.absent, self.clean = absent[i], bool(clean[i])
            self.total = math.log(totals[i]) if totals[i] > 0 else math.nan
            self.loss = _known(losses, i)
            self.has_loss = losses is not None and float(losses[i]) != NOT_MEASURED
            self.skipped = SKIP_REASONS[int(batch.skip_reason[i])]
            rate, factor = _known(rates, i), _known(factors, i)
            self.lr = rate if math.isnan(factor) else rate * factor
            self.samples = sampled.get(i, {})
            self._take_samples()
            yield self
            self._settle()

    @property
    def total_rise(self) -> float | None:
        """How far the global norm is above its baseline, nats; None while either is unknown."""
        rise = self.total - self.total_level
        return None if math.isnan(rise) else rise

    def _take_samples(self) -> None:
        for name in ("weight_norm", "update_ratio"):
            values = self.samples.get(name)
            if values is not None:
                np.copyto(getattr(self, name), values, where=values != NOT_MEASURED)

    def _settle(self) -> None:
        """Learn from the step that the rules have seen."""
        if math.isfinite(self.loss):
            self.course.add(self.loss, self.step)
        self._learn_layers()
        self._learn_total()
        self.trend.add(np.where(np.isnan(self.logs), self.level, self.logs) if not self.clean else self.logs)
        self.index += 1

    def _learn_layers(self) -> None:
        if self.clean:
            self.seen += 1
        else:
            self.seen += ~np.isnan(self.logs)
        weight = np.maximum(BASELINE_WEIGHT, 1.0 / np.maximum(self.seen, 1))
        change = self.logs - self.level
        limit = CLIP * self.spread + LEAST_SPREAD
        size = np.minimum(np.abs(change), limit)
        first = self.seen <= 2
        step = np.where(first, change, np.copysign(size, change)) * weight
        spread = (np.where(first, np.abs(change), size) - self.spread) * weight
        if self.clean and self.index:
            self.level += step
            self.spread += spread
        else:
            fresh = np.isnan(self.level) & ~np.isnan(self.logs)
            self.level[fresh] = self.logs[fresh]
            self.level += np.where(np.isnan(step), 0.0, step)
            self.spread += np.where(np.isnan(spread), 0.0, spread)

    def _learn_total(self) -> None:
        if math.isnan(self.total):
            return
        self.total_seen += 1
        if self.total_seen == 1:
            self.first_total = self.total_level = self.total
            return
        weight = max(BASELINE_WEIGHT, 1.0 / self.total_seen)
        change = self.total - self.total_level
        size = min(abs(change), CLIP * self.total_spread + LEAST_SPREAD) if self.total_seen > 2 else abs(change)
        self.total_level += weight * math.copysign(size, change)
        self.total_spread += weight * (size - self.total_spread)


def _known(values: Floats | None, i: int) -> float:
    if values is None:
        return math.nan
    value = float(values[i])
    return math.nan if value == NOT_MEASURED else value


def _sampled(batch: StepBatch) -> dict[int, dict[str, Floats]]:
    """Row of the batch to the statistics taken there."""
    found: dict[int, dict[str, Floats]] = {}
    for name, samples in batch.statistics.items():
        for row, values in zip(samples.rows.tolist(), samples.values, strict=True):
            found.setdefault(row, {})[name] = values
    return found
