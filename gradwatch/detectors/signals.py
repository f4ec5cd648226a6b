"""What the rules look at, computed once a step for all of them: layer norms, robust baselines, trends, the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.losses import LossCourse
from gradwatch.detectors.memory import FloatArray, Kept, Mask, Part, PerLayer, Remembers
from gradwatch.detectors.pace import Pace
from gradwatch.detectors.past import Opening, Sizes
from gradwatch.detectors.profile import DepthProfile
from gradwatch.detectors.recent import Recent
from gradwatch.detectors.scales import Scales
from gradwatch.detectors.trend import Trend
from gradwatch.records import DISCARDED, NOT_MEASURED, SKIP_REASONS, Floats, StepBatch

#: Weight of a new step in the robust baseline: a memory of 50 steps.
BASELINE_WEIGHT = 0.02
#: A baseline never takes a step at more than this many of its spreads (Huber's clipping): a spike hardly moves it.
CLIP = 3.0
#: Least spread of a log norm: 5 %.
LEAST_SPREAD = 0.05
#: A global norm counts as the run's own scale after this many steps.
SETTLED = 5
#: The norm of a sum of many gradients hardly differs between batches whose losses do: at most so much of their change.
STEADY = 0.2
#: Share of the first loss whose loss is proof of learning.
LEARNT = 0.1


_NO_SAMPLES: dict[str, Floats] = {}
#: What may have happened at a step that wakes a rule: bits of `Signals.events`.
EVERY_STEP, SAMPLE, DAMAGE, SCALE, IDLE = 1, 2, 4, 8, 16


class Signals(Remembers):
    """The state of a run after each step, for the rules to look at.

    Baselines (`level`, `spread`, `total_level`, `total_spread`, `peak`) know the steps before this one; all else knows
    this one too. Norms of a step that a `GradScaler` skipped are passed over.

    Attributes:
        index: Steps seen before this one.
        step: Its number.
        row: Gradient norms of the parameters, shape (p,).
        norms, logs: Norms of the layers, shape (l,), and their logarithms, NaN where absent, zero or not finite.
        absent, zero, bad: Masks of layers: no gradient; exactly zero; not finite.
        clean: Whether no layer is any of these.
        total: Logarithm of the global norm over what is finite; NaN where nothing is.
        level, spread: Robust running mean of `logs` and of its absolute deviation, shape (l,).
        total_level, total_spread: The same of `total`.
        total_change: Mean change of `total` from step to step.
        steady: Steps at which the norm had been changing less than `STEADY` times as much as the loss.
        peak: The highest that `total_level` has been.
        loss: The loss of this step; NaN where not known. `has_loss` tells a NaN loss from none.
        opening, sizes: What the first step showed; the distribution of the global norm.
        stable_rate: The learning rate when the loss was at its best.
        skipped: Why the optimizer did not step, or "".
        scale: The loss scale of mixed precision; `NOT_MEASURED` where there is none.
        samples: Statistics taken at this step, name to row.
        discarded: Whether a loss that was not finite came before this step, and the loop took no step with it.
        events: `SAMPLE` where there are any, `DAMAGE` where a layer is not clean, the loss is not finite or the step
            was skipped, `SCALE` where the gradient was scaled, `IDLE` where the learning rate is 0, and always
            `EVERY_STEP`.
    """

    index = Kept(0)
    level = PerLayer(math.nan)
    spread = PerLayer(0.0)
    seen = PerLayer(0)
    unknown = Kept(True)
    total_level = Kept(math.nan)
    total_spread = Kept(0.0)
    total_change = Kept(math.nan)
    total_last = Kept(math.nan)
    total_seen = Kept(0)
    steady = Kept(0)
    peak = Kept(-math.inf)
    course = Part(LossCourse)
    trend = Part(Trend)
    profile = Part(DepthProfile)
    pace = Part(Pace)
    scales = Part(Scales)
    totals = Part(Recent)
    opening = Part(Opening)
    sizes = Part(Sizes)
    stable_rate = Kept(math.nan)

    def grow(self, context: RunContext) -> None:
        """Go on with more parameters, whose baselines are not known yet."""
        super().grow(context)
        self.unknown = True

    @property
    def total_rise(self) -> float:
        """How far the global norm is above its baseline, nats; NaN while either is unknown."""
        return self.total - self.total_level

    @property
    def above_peak(self) -> float:
        """How far the global norm is above the highest its baseline has been, nats; NaN while either is unknown."""
        return self.total - self.peak if self.total_seen >= SETTLED else math.nan

    def advance(self, batch: StepBatch) -> Iterator[Signals]:
        """Look at each step of the batch in turn; yields itself."""
        names = ("loss", "lr", "lr_factor", "grad_scale", DISCARDED)
        losses, rates, factors, scales, discarded = (_listed(batch, name) for name in names)
        self.modules = batch.modules
        sampled = _sampled(batch)
        norms = self.context.layers.norms(batch.grad_norm)
        clean, logs, zero, bad, absent = _logarithms(norms)
        power = np.where(np.isnan(logs), 0.0, norms) if not clean.all() else norms
        totals = np.sqrt(np.add.reduce(np.square(power), axis=1)).tolist()
        cleans, reasons = clean.tolist(), batch.skip_reason.tolist()
        for i, step in enumerate(batch.step.tolist()):
            self.step, self.row, self.clean = step, batch.grad_norm[i], cleans[i]
            self.norms, self.logs, self.zero, self.bad, self.absent = norms[i], logs[i], zero[i], bad[i], absent[i]
            self.total = math.log(totals[i]) if totals[i] > 0 else math.nan
            self.has_loss, self.skipped = losses[i] != NOT_MEASURED, SKIP_REASONS[reasons[i]]
            self.loss = losses[i] if self.has_loss else math.nan
            self.scale, self.samples = scales[i], sampled.get(i, _NO_SAMPLES)
            self.discarded = discarded[i] > 0
            is_lost = self.discarded or (self.has_loss and not math.isfinite(self.loss))
            is_damaged = not self.clean or reasons[i] or is_lost
            self.events = EVERY_STEP | (SAMPLE if self.samples else 0) | (DAMAGE if is_damaged else 0)
            given = rates[i] if rates[i] != NOT_MEASURED else math.nan
            rate = given * factors[i] if factors[i] != NOT_MEASURED and factors[i] == factors[i] else given
            self.events |= (SCALE if self.scale > 0 else 0) | (IDLE if rate == 0 else 0)
            self.pace.schedule(given, step)
            self._take(rate)
            yield self
            self._learn()

    def _take(self, rate: float) -> None:
        """Bring up to date what may know this step."""
        if math.isfinite(self.loss):
            self.course.add(self.loss, self.step)
            if self.course.best_step == self.step or self.index == 0:
                self.stable_rate = self.pace.rate if self.index else rate  # this loss came of the step before
        self.pace.add(rate, self.samples, self.step)
        if self.pace.fresh:
            is_learning = not self.course.known or self.course.fallen > LEARNT
            self.scales.add(self.pace.weight_norm, self.pace.ratio, is_learning=is_learning)
        if self.skipped == "grad_scaler":
            return
        self.totals.add(self.total)
        self.sizes.add(self.total)
        self.profile.add(self.logs, self.clean)
        if not self.opening.seen:
            matrices = float(np.linalg.norm(self.row[self.pace.matrices & np.isfinite(self.row)].astype(np.float64)))
            self.opening.take(self.total, self.logs, self.profile, matrices)
        self.trend.add(self.logs if self.clean else np.where(np.isnan(self.logs), self.level, self.logs))

    def _learn(self) -> None:
        """Bring up to date what must not know a step before it was judged."""
        self.index += 1
        if self.skipped == "grad_scaler":
            return
        self._learn_layers()
        self._learn_total()

    def _learn_layers(self) -> None:
        known = None if self.clean and not self.unknown else ~np.isnan(self.logs)
        self.seen += 1 if known is None else known
        change = self.logs - self.level
        size = np.abs(change)
        if self.index > SETTLED:
            np.minimum(size, CLIP * self.spread + LEAST_SPREAD, out=size)
        weight = (
            max(BASELINE_WEIGHT, 1 / self.index)
            if known is None
            else np.maximum(BASELINE_WEIGHT, 1 / np.maximum(self.seen, 1))
        )
        step = np.copysign(size, change) * weight
        spread = (size - self.spread) * weight
        if known is None:
            self.level += step
            self.spread += spread
        else:
            self.level = np.where(np.isnan(self.level), self.logs, self.level + np.nan_to_num(step))
            self.spread += np.nan_to_num(spread)
            self.unknown = bool(np.isnan(self.level).any())

    def _learn_total(self) -> None:
        if math.isnan(self.total):
            return
        self.total_seen += 1
        if self.total_seen == 1:
            self.total_level = self.total_last = self.total
            self.total_change = 0.0
            return
        weight = max(BASELINE_WEIGHT, 1 / self.total_seen)
        self.total_change += weight * (min(abs(self.total - self.total_last), 1.0) - self.total_change)
        self.steady += self.total_change * abs(self.course.fast) < STEADY * self.course.noise  # false of NaN
        self.total_last = self.total
        change = self.total - self.total_level
        size = abs(change)
        if self.total_seen > SETTLED:
            size = min(size, CLIP * self.total_spread + LEAST_SPREAD)
        self.total_level += weight * math.copysign(size, change)
        self.total_spread += weight * (size - self.total_spread)
        if self.total_seen >= SETTLED:
            self.peak = max(self.peak, self.total_level)


def _logarithms(norms: FloatArray) -> tuple[Mask, FloatArray, Mask, Mask, Mask]:
    """Which rows have a usable norm in every layer; logarithms; masks of zero, not finite and absent norms."""
    if norms.size and norms.min() > 0 and norms.max() < math.inf:  # false of NaN
        nothing = np.zeros(norms.shape, dtype=bool)
        return np.ones(len(norms), dtype=bool), np.log(norms), nothing, nothing, nothing
    absent, zero = norms == NOT_MEASURED, norms == 0.0
    bad = ~(np.isfinite(norms) | absent)
    none = absent | zero | bad
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(norms)
    logs[none] = math.nan
    return ~none.any(axis=1), logs, zero, bad, absent


def _listed(batch: StepBatch, name: str) -> list[float]:
    values = batch.metrics.get(name)
    found: list[float] = [NOT_MEASURED] * len(batch) if values is None else values.tolist()
    return found


def _sampled(batch: StepBatch) -> dict[int, dict[str, Floats]]:
    """Row of the batch to the statistics taken there."""
    found: dict[int, dict[str, Floats]] = {}
    for name, samples in batch.statistics.items():
        for row, values in zip(samples.rows.tolist(), samples.values, strict=True):
            found.setdefault(row, {})[name] = values
    return found
