"""How far a step moves the weights: too far, or nowhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import Signals
from gradwatch.records import Finding


@dataclass(kw_only=True, eq=False)
class UpdateRatio(Rule):
    """Steps change the weights by too large a share, or will soon if the learning rate goes on rising as it does."""

    high: float = threshold(0.1, above=0.0)
    horizon: int = threshold(20, least=1)
    calm: int = threshold(30, least=1)

    rule: ClassVar[str] = "update_ratio"
    rules: ClassVar[tuple[str, ...]] = ("update_ratio",)
    held = Kept("")
    forecast = Kept(math.nan)

    def look(self, now: Signals) -> Sign | None:
        """A sign while updates are or will be too large."""
        pace = now.pace
        if pace.fresh:
            self.held = self._judge(now)
        if not self.held:
            return None
        layers = pace.ratio > self.high
        value = pace.total if self.held == "now" else self.forecast
        return Sign(
            severity="warning", badness=math.log(value), value=value, threshold=self.high, layers=layers,
            scores=np.nan_to_num(pace.ratio, nan=-math.inf),
            facts=lambda: {
                "sign": self.held, "ratio": pace.total, "lr": pace.rate if pace.rate > 0 else None,
                "lr_growth": pace.growth, "horizon": self.horizon,
            },
        )  # fmt: skip

    def _judge(self, now: Signals) -> str:
        pace = now.pace
        before = pace.previous
        if pace.total > self.high and before > self.high and pace.total > 0.5 * before and not now.course.falling:
            return "now"
        self.forecast = pace.total * math.exp(min(pace.growth * self.horizon, 50))
        if pace.growth > 0.02 and self.forecast > self.high and pace.total > 1.3 * before:
            return "soon"
        return ""

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        if facts.get("sign") == "soon":
            return (
                f"The learning rate grows {math.expm1(facts['lr_growth']):.1%} a step and updates are at "
                f"{facts['ratio']:.2g} of the weights at step {finding.last_step}: within {facts['horizon']} steps they "
                f"will be {finding.value:.2g}, above {finding.threshold:g}."
            )
        return (
            f"Each update changes the weights by {finding.value:.2g} of their norm since step {finding.first_step} "
            f"(a healthy run is near 0.001, the limit is {finding.threshold:g}) and the loss does not fall."
        )


@dataclass(kw_only=True, eq=False)
class Stall(Rule):
    """Weights hardly move although there is a gradient and nothing was learnt."""

    low: float = threshold(1e-6, above=0.0)
    samples: int = threshold(3, least=1)
    calm: int = threshold(30, least=1)

    rule: ClassVar[str] = "stall"
    rules: ClassVar[tuple[str, ...]] = ("stall",)
    count = Kept(0)
    since = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while the weights stand still."""
        pace = now.pace
        if pace.fresh:
            rising = pace.growth > 1e-3
            small = pace.total < self.low and not rising and now.course.fallen < 0.05 and not math.isnan(now.total)
            self.count = self.count + 1 if small else 0
            if self.count == 1:
                self.since = now.step
        if self.count < self.samples:
            return None
        return Sign(
            severity="warning", badness=-math.log(max(pace.total, 1e-30)), value=pace.total, threshold=self.low,
            since=self.since, facts=lambda: {"lr": pace.rate if pace.rate > 0 else None},
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        return (
            f"Updates change the weights by only {finding.value:.1g} of their norm since step {finding.first_step} "
            f"and the loss has not moved: nothing is being learnt."
        )
