"""Gradients that grow: suddenly, exponentially, and for one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradwatch.detectors import wording
from gradwatch.detectors.drift import Drift
from gradwatch.detectors.drift import facts as drift_facts
from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import FloatArray, Kept, Part
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import Signals
from gradwatch.detectors.trend import WINDOW
from gradwatch.records import Finding

#: An explosion is not over while the loss is this share of its first value above its best.
BACK = 0.1


@dataclass(kw_only=True, eq=False)
class Exploding(Rule):
    """Gradients leave the range that the run had so far, upwards, and stay there; or one layer grows exponentially.

    Signs, all but the last on log norms:

    - *level* (critical): the global norm is `ratio` times above the highest that its robust baseline has been,
      `patience` steps in a row. The baseline is a clipped running mean over 50 steps (Huber's psi at 3 mean
      deviations): it follows warm-up and decay and hardly notices a spike. Once found, it is held against what was
      usual before, until the loss is back at its best: a run that got used to its explosion has not recovered.
    - *drift* (warning): a layer's slope against the median layer over 48 steps is `growth` a step or more, adds up to
      `rise` nats, is `certainty` standard errors from zero, comes from both halves of the window, and is twice as steep
      as slopes have usually been in this run. Growth of 3 % a step is found after about 50 steps; rules that hold a
      norm against k times its running mean (weight a) see nothing below 1 + (k - 1) a per step.
    - *size* (critical): the global norm is above `limit`, `patience` steps in a row, whatever the run was used to.
      Above 1.8e19 squares overflow float32: the second moments of Adam become infinite and its updates nothing.

    Args:
        ratio: Sustained factor above the run's own range. Megatron-LM's check for large gradients takes ten times the
            largest of 100 steps at a single step; held for `patience` steps the factor keeps outliers out.
        patience: Steps in a row.
        growth: Nats per step.
        rise: Nats over the window: a threefold change.
        certainty: Slope over its standard error; early training reaches 5 by chance, measured on healthy runs.
        limit: Global norm that no training needs; the largest of the healthy published cases is 1.7e4.
        calm: Steps without a sign until the finding resolves.

    False alarms: a change of data or loss that multiplies the gradients for good is reported, and rightly so. In the
    first hundred steps layers find their level; a drift there must last 24 steps longer before it is reported.
    """

    ratio: float = threshold(10.0, above=1.0)
    patience: int = threshold(3, least=1)
    growth: float = threshold(0.02, above=0.0)
    rise: float = threshold(1.1, above=0.0)
    certainty: float = threshold(8.0, above=0.0)
    limit: float = threshold(1e15, above=0.0)

    rule: ClassVar[str] = "exploding"
    rules: ClassVar[tuple[str, ...]] = ("exploding",)
    count = Kept(0)
    since = Kept(0)
    huge = Kept(0)
    usual = Kept(math.nan)
    drift = Part(Drift)

    def look(self, now: Signals) -> Sign | None:
        """A sign while gradients are out of range or grow."""
        return self._level(now) or self._size(now) or self._drift(now)

    def _level(self, now: Signals) -> Sign | None:
        if not (self.life.open and now.course.above_best > BACK):
            self.usual = now.peak
        above = now.above_peak + now.peak - self.usual
        if not above > math.log(self.ratio):
            self.count = 0
            return None
        self.count += 1
        if self.count == 1:
            self.since = now.step
        if self.count < self.patience:
            return None
        scores = np.nan_to_num(now.logs - now.level, nan=-math.inf)
        layers = scores > math.log(self.ratio)
        return Sign(
            severity="critical",
            badness=above,
            value=wording.exp(above),
            threshold=self.ratio,
            layers=layers,
            scores=scores,
            since=self.since,
            facts=lambda: {"sign": "level", "norm": wording.exp(now.total), "usual_norm": wording.exp(self.usual)},
        )

    def _size(self, now: Signals) -> Sign | None:
        excess = now.total - math.log(self.limit)
        self.huge = self.huge + 1 if excess > 0 else 0
        if self.huge < self.patience:
            return None
        scores = np.nan_to_num(now.logs, nan=-math.inf)
        return Sign(
            severity="critical",
            badness=excess,
            value=wording.exp(now.total),
            threshold=self.limit,
            layers=scores > math.log(self.limit),
            scores=scores,
            since=now.step - self.huge + 1,
            facts=lambda: {"sign": "size", "norm": wording.exp(now.total)},
        )

    def _drift(self, now: Signals) -> Sign | None:
        trend, drift = now.trend, self.drift
        if trend.fresh:
            drift.follow(trend, growth=self.growth, rise=self.rise, certainty=self.certainty)
        if not drift.any:
            return None
        slope = float(np.fmax.reduce(np.where(drift.active, trend.slope, -math.inf)))
        return Sign(
            severity="warning",
            badness=slope * WINDOW,
            value=math.expm1(slope),
            threshold=math.expm1(self.growth),
            layers=drift.active,
            scores=trend.slope * WINDOW,
            since=max(0, now.step - WINDOW + 1),
            facts=lambda: drift_facts(slope, now, drift.active),
        )

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        where = wording.where(finding)
        if finding.evidence.get("sign") == "drift":
            return wording.drift("grow", where, finding)
        if finding.evidence.get("sign") == "size":
            return (
                f"Gradients are beyond all bounds{where} since step {finding.first_step}: "
                f"a norm of {finding.value:.3g}, and above 1.8e+19 squares overflow float32."
            )
        return (
            f"Gradients explode{where} since step {finding.first_step}: "
            f"{finding.value:.3g} times the largest usual norm of this run ({finding.evidence.get('usual_norm'):.3g})."
        )


@dataclass(kw_only=True, eq=False)
class Spike(Rule):
    """A gradient far above anything the run had before, for a step or two.

    Info from `ratio` times the baseline on; a warning when it is also unprecedented: `alarm_ratio` times the baseline,
    `ratio` times the highest that the baseline has been, and three times any earlier rise that was not itself such a
    spike. So heavy-tailed data, whose outliers have precedents, stay quiet (a z-score on the norm does not: ZClip's 2.5
    fires in 87 % of healthy runs, OLMo's 6 in 62 %).

    Args:
        ratio: Factor over the baseline.
        alarm_ratio: Factor for a warning.
        spreads: And this many mean absolute deviations of the log norm.
        warmup: Steps before the rule speaks.
        calm: Steps without a sign until the finding resolves.

    False alarms: a very late first outlier of a distribution with infinite variance.
    """

    ratio: float = threshold(20.0, above=1.0)
    alarm_ratio: float = threshold(100.0, above=1.0)
    spreads: float = threshold(8.0, above=0.0)
    warmup: int = threshold(20, least=2)
    calm: int = threshold(3, least=1)

    rule: ClassVar[str] = "spike"
    rules: ClassVar[tuple[str, ...]] = ("spike",)
    precedent = Kept(0.0)
    spikes = Kept[list[int]]([])

    def look(self, now: Signals) -> Sign | None:
        """A sign at a step that stands out."""
        rise = now.total_rise
        if not rise > 0 or now.total_seen < self.warmup:
            return None
        unusual = rise > math.log(self.ratio) and rise > self.spreads * now.total_spread
        grave = (
            unusual
            and rise > max(math.log(self.alarm_ratio), self.precedent + math.log(3))
            and now.above_peak > math.log(self.ratio)
        )
        if grave:
            self.spikes = [*self.spikes[-9:], now.step]
        else:
            self.precedent = max(self.precedent, rise)
        if not unusual:
            return None
        scores: FloatArray = np.nan_to_num(now.logs - now.level, nan=-math.inf)
        return Sign(
            severity="warning" if grave else "info",
            badness=rise,
            value=wording.exp(rise),
            threshold=self.ratio,
            layers=scores > math.log(self.ratio),
            scores=scores,
            facts=lambda: {
                "norm": wording.exp(now.total),
                "usual_norm": wording.exp(now.total_level),
                "loss": now.loss if math.isfinite(now.loss) else None,
                "steps": self.spikes,
            },
        )

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        norm = finding.evidence.get("norm", math.nan)
        first = f", most in {finding.layers[0]!r}" if finding.layers else ""
        return (
            f"The gradient norm jumped to {norm:.3g} at step {finding.first_step}, "
            f"{finding.value:.3g} times its usual size{first}."
        )
