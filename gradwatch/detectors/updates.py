"""How far a step moves the weights: too far, or nowhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradwatch.detectors import wording
from gradwatch.detectors.base import RunContext
from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept, PerLayer
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import IDLE, SAMPLE, Signals
from gradwatch.records import Finding


@dataclass(kw_only=True, eq=False)
class UpdateRatio(Rule):
    """Steps change the weights by too large a share, or will soon if the learning rate goes on rising as it does.

    The ratio is ‖Δw‖/‖w‖ over matrices, as sampled. Signs, all warnings:

    - *jump*: one update changed a layer by `jump_ratio`, in a network of several layers, and the loss rose before the
      next sample, where it is known.
    - *now*: above `high` in two samples and the loss does not fall.
    - *soon*: the learning rate is higher than it ever was and rising, and the last three samples, continued for
      `horizon` steps on a line (on an exponential if their growth does not slow down), pass `high`.
    - *risky*: the same with two samples above `risky` and a loss that does not fall.

    Karpathy's rule of thumb is 1e-3; TheDeepChecker alarms above 0.1, which alone fires in 27 % of healthy runs.

    Args:
        high: Too large a ratio.
        jump_ratio: Of a single layer at a single step.
        risky: While the learning rate is on new ground.
        horizon: Steps to look ahead.
        calm: Steps without a sign until the finding resolves.

    False alarms: linear models that begin at zero, for their first steps.
    """

    high: float = threshold(0.1, above=0.0)
    jump_ratio: float = threshold(0.5, above=0.0)
    risky: float = threshold(0.05, above=0.0)
    horizon: int = threshold(20, least=1)
    calm: int = threshold(30, least=1)

    rule: ClassVar[str] = "update_ratio"
    rules: ClassVar[tuple[str, ...]] = ("update_ratio",)
    wakes_on: ClassVar[int] = SAMPLE
    held = Kept("")
    forecast = Kept(math.nan)
    earlier = Kept(math.nan)
    bar = Kept(math.inf)
    since = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while updates are or will be too large."""
        pace = now.pace
        if pace.fresh:
            self.held = self._judge(now)
            self.earlier, self.since = pace.previous, now.step
            if self.held == "jump" and now.course.known:
                self.held, self.bar = "waiting", _bar(now)
        if self.held == "waiting" and now.has_loss and not now.loss <= self.bar:  # true of NaN
            self.held = "jump"
        self.follows = self.held == "waiting"
        if self.held in ("", "waiting"):
            return None
        largest = float(np.fmax.reduce(pace.ratio))
        limit = self.jump_ratio if self.held == "jump" else self.high if self.held != "risky" else self.risky
        value = {"jump": largest, "now": pace.total, "soon": self.forecast, "risky": pace.total}[self.held]
        return Sign(
            severity="warning", badness=math.log(value), value=value, threshold=limit, layers=pace.ratio > limit,
            since=self.since if self.held == "jump" else None,
            scores=np.nan_to_num(pace.ratio, nan=-math.inf),
            facts=lambda: {
                "sign": self.held, "ratio": pace.total, "largest_ratio": largest,
                "lr": pace.rate if pace.rate > 0 else None, "lr_growth": pace.growth, "horizon": self.horizon,
            },
        )  # fmt: skip

    def _judge(self, now: Signals) -> str:
        pace, course = now.pace, now.course
        if np.count_nonzero(pace.ratio > 0) > 1 and float(np.fmax.reduce(pace.ratio)) > self.jump_ratio:
            return "jump"
        before = pace.previous
        falling = course.falling or (course.known and course.seen < 25 and now.loss < course.start)
        if min(pace.total, before) > self.high and pace.total > 0.5 * before and not falling:
            return "now"
        if not pace.new_territory:
            return ""
        self.forecast = _extrapolated(self.earlier, before, pace.total, self.horizon / 10)
        if self.forecast > self.high and pace.total > 0.02:
            return "soon"
        return "risky" if min(pace.total, before) > self.risky and not course.falling else ""

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts, step = finding.evidence, finding.first_step
        sign = facts.get("sign")
        if sign == "jump":
            where = f" of {finding.layers[0]!r}" if finding.layers else ""
            return f"One update at step {step} changed the weights{where} by {finding.value:.0%} of their norm."
        if sign in ("soon", "risky"):
            growth = math.expm1(facts.get("lr_growth", 0.0))
            ahead = f": within {facts.get('horizon')} steps that will be {finding.value:.0%}" if sign == "soon" else ""
            return (
                f"The learning rate grows {growth:.1%} a step and is higher than ever in this run; at step {step} an "
                f"update changes the weights by {facts.get('ratio', math.nan):.1%} of their norm{ahead}."
            )
        return (
            f"Each update changes the weights by {finding.value:.0%} of their norm since step {step} "
            f"(0.1% is healthy, {finding.threshold:.0%} the limit) and the loss does not fall."
        )


def _bar(now: Signals) -> float:
    """What the loss stays below when a step did no harm."""
    course = now.course
    return max(now.loss, course.fast) + 2 * course.noise + 0.02 * course.scale


def _extrapolated(first: float, second: float, third: float, samples: float) -> float:
    """Where three growing samples lead: on a line, or on an exponential unless growth slows down; else NaN."""
    if not 0 < first < second < third:
        return math.nan
    early, late = math.log(second / first), math.log(third / second)
    if late < 0.7 * early:
        return third + samples * (third - second)
    return third * math.exp(min(samples * min(early, late), 50.0))


@dataclass(kw_only=True, eq=False)
class Stall(Rule):
    """Weights hardly move although there is a gradient and nothing was learnt.

    A warning when in `samples` samples running a layer's update ratio is below `layer_low`, or all layers' is below
    `low`, or half-precision weights move less than their resolution allows (`coarse`; bfloat16 rounds changes below
    0.4 % away unless they add up first). Not while the learning rate rises (warm-up), nor once the loss has fallen
    by half. A warning too when the learning rate is exactly 0 for `idle` steps and no sampled weight moves,
    whatever was learnt: the steps from then on are for nothing. Counterpart of SageMaker's UnchangedTensor and of
    the small side of its WeightUpdateRatio (1e-8).

    Args:
        low: Ratio over all layers.
        layer_low: Ratio of a layer.
        coarse: Ratio of layers in bfloat16 or float16.
        samples: Samples in a row.
        idle: Steps in a row with a learning rate of 0. Warm-up begins with one such step, linear decay ends with one.
        calm: Steps without a sign until the finding resolves.

    False alarms: without a logged loss, none is raised after the start, for a converged model stalls too.
    """

    low: float = threshold(1e-6, above=0.0)
    layer_low: float = threshold(1e-8, above=0.0)
    coarse: float = threshold(1e-4, above=0.0)
    samples: int = threshold(3, least=1)
    idle: int = threshold(25, least=1)
    calm: int = threshold(30, least=1)

    rule: ClassVar[str] = "stall"
    rules: ClassVar[tuple[str, ...]] = ("stall",)
    wakes_on: ClassVar[int] = SAMPLE | IDLE
    count = PerLayer(0)
    since = Kept(0)

    def prepare(self, context: RunContext) -> None:
        """See `Remembers.prepare`."""
        self._coarse = np.zeros(len(context.layers), dtype=bool)
        for parameter, layer in zip(context.parameters, context.layers.of_parameter, strict=True):
            self._coarse[layer] |= parameter.dtype in ("bfloat16", "float16")

    def look(self, now: Signals) -> Sign | None:
        """A sign while weights stand still."""
        pace = now.pace
        if pace.fresh:
            self._sample(now)
        if pace.idle >= self.idle and not pace.total > 0:  # true of NaN
            return self._rate(now)
        layers = self.count >= self.samples
        if not layers.any():
            return None
        ratio = float(np.nanmin(np.where(layers, pace.ratio, math.nan)))
        return Sign(
            severity="warning" if now.course.known or self.since <= 30 else "info",
            badness=-math.log(max(ratio, 1e-30)), value=ratio, threshold=self.low,
            layers=layers, scores=-np.nan_to_num(pace.ratio), since=self.since,
            facts=lambda: {
                "lr": pace.rate if pace.rate > 0 else None, "everywhere": bool(layers.all()),
                "rounded": bool((layers & self._coarse).any()), "ratio": pace.total,
            },
        )  # fmt: skip

    def _rate(self, now: Signals) -> Sign:
        pace = now.pace
        return Sign(
            severity="warning", badness=math.log(pace.idle), value=0.0, threshold=0.0, since=now.step - pace.idle + 1,
            facts=lambda: {"sign": "rate", "lr": 0.0, "earlier_lr": pace.rates[-1] if pace.rates else None},
        )  # fmt: skip

    def _sample(self, now: Signals) -> None:
        pace, course = now.pace, now.course
        idle = pace.growth > 1e-3 or (not pace.rate > 0 and not math.isnan(pace.rate)) or now.skipped
        if idle or course.fallen > (0.9 if course.fast < 0.1 * course.start else 0.5) or math.isnan(now.total):
            self.count[:] = 0
            return
        with np.errstate(invalid="ignore"):
            low = pace.ratio < self.layer_low
            if course.fallen < 0.05:
                low |= np.where(self._coarse, pace.ratio < self.coarse, False)
                if pace.total < self.low:
                    low |= pace.ratio < self.low
        low &= ~np.isnan(now.logs)
        if low.any() and not self.count.any():
            self.since = now.step
        self.count = np.where(low, self.count + 1, 0)

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        if finding.evidence.get("sign") == "rate":
            earlier = finding.evidence.get("earlier_lr")
            was = f", after {earlier:.3g}" if earlier else ""
            return f"The learning rate is exactly 0 since step {finding.first_step}{was}: no weight has moved since."
        everywhere = finding.evidence.get("everywhere")
        place = "the weights" if everywhere else f"the weights{wording.where(finding)}"
        much = f"by only {finding.value:.1g} of their norm" if finding.value > 0 else "not at all"
        return (
            f"Updates change {place} {much} since step {finding.first_step}, "
            f"although there is a gradient: nothing is learnt there."
        )
