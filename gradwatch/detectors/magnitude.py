"""Gradients that grow or vanish, in time and across depth."""

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
class Exploding(Rule):
    """Gradients far above their own past, for several steps, or growing exponentially."""

    ratio: float = threshold(100.0, above=1.0)
    patience: int = threshold(3, least=1)
    growth: float = threshold(0.02, above=0.0)
    rise: float = threshold(1.2, above=0.0)

    rule: ClassVar[str] = "exploding"
    rules: ClassVar[tuple[str, ...]] = ("exploding",)
    count = Kept(0)
    since = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while gradients are out or grow."""
        rise = now.total_rise
        if rise is not None and rise > math.log(self.ratio) and now.index >= 3:
            self.count += 1
            if self.count == 1:
                self.since = now.step
            if self.count >= self.patience or rise > 2 * math.log(self.ratio):
                layers = now.logs > now.level + math.log(self.ratio)
                scores = now.logs - now.level
                return Sign(
                    severity="critical", badness=rise, value=math.exp(min(rise, 700)), threshold=self.ratio,
                    layers=layers, scores=np.where(layers, scores, -math.inf), since=self.since,
                    facts=lambda: {"sign": "level", "norm": math.exp(min(now.total, 700))},
                )  # fmt: skip
        else:
            self.count = 0
        return None

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        where = f" in {len(finding.layers)} layers, worst {finding.layers[0]!r}" if finding.layers else ""
        return f"Gradients explode{where} since step {finding.first_step}: {finding.value:.3g} times their usual norm."


@dataclass(kw_only=True, eq=False)
class Vanishing(Rule):
    """Gradients of the first layers are vanishingly small against those of the last, or decay exponentially."""

    ratio: float = threshold(1e-4, above=0.0, most=1.0)
    patience: int = threshold(10, least=1)

    rule: ClassVar[str] = "vanishing"
    rules: ClassVar[tuple[str, ...]] = ("vanishing",)
    count = Kept(0)
    since = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while layers are far below the largest one."""
        with np.errstate(invalid="ignore"):
            top = np.fmax.reduce(now.logs) if len(now.logs) else math.nan
            low = now.logs < top + math.log(self.ratio)
        if not low.any():
            self.count = 0
            return None
        self.count += 1
        if self.count == 1:
            self.since = now.step
        if self.count < self.patience:
            return None
        gap = top - now.logs
        worst = float(np.nanmax(gap))
        return Sign(
            severity="warning", badness=worst, value=math.exp(-worst), threshold=self.ratio, layers=low,
            scores=np.where(low, gap, -math.inf), since=self.since, facts=lambda: {"sign": "depth"},
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        where = f" in {len(finding.layers)} layers, worst {finding.layers[0]!r}" if finding.layers else ""
        return (
            f"Gradients vanish{where} since step {finding.first_step}: {finding.value:.3g} of the largest layer's norm."
        )


@dataclass(kw_only=True, eq=False)
class Spike(Rule):
    """A gradient far above its own past for a step or two, which then recovers."""

    ratio: float = threshold(20.0, above=1.0)
    spreads: float = threshold(8.0, above=0.0)
    warmup: int = threshold(20, least=2)
    calm: int = threshold(3, least=1)

    rule: ClassVar[str] = "spike"
    rules: ClassVar[tuple[str, ...]] = ("spike",)

    def look(self, now: Signals) -> Sign | None:
        """A sign at a step that stands out."""
        rise = now.total_rise
        if rise is None or now.total_seen < self.warmup:
            return None
        if rise < math.log(self.ratio) or rise < self.spreads * now.total_spread:
            return None
        scores = now.logs - now.level
        layers = scores > math.log(self.ratio)
        return Sign(
            severity="warning", badness=rise, value=math.exp(min(rise, 700)), threshold=self.ratio, layers=layers,
            scores=np.where(layers, scores, -math.inf),
            facts=lambda: {"norm": math.exp(min(now.total, 700)), "usual": math.exp(min(now.total_level, 700))},
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        where = f", most in {finding.layers[0]!r}" if finding.layers else ""
        return (
            f"The gradient norm jumped to {finding.value:.3g} times its usual size at step {finding.first_step}{where}."
        )
