"""Gradients that vanish: over depth, in time, and all at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradwatch.detectors import wording
from gradwatch.detectors.drift import Drift
from gradwatch.detectors.drift import facts as drift_facts
from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept, Part
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import Signals
from gradwatch.detectors.trend import LEAST_LAYERS, WINDOW
from gradwatch.records import Finding, Severity

#: Norms that were too low over depth have recovered when they are this many times above the threshold.
RELIEF = 10.0


@dataclass(kw_only=True, eq=False)
class Vanishing(Rule):
    """Layers near the input get almost no gradient; or the whole network stops getting one before it has learnt.

    Signs:

    - *depth* (warning; critical when nothing was learnt after 50 steps): smoothed norms of layers are below `ratio`
      times the largest norm of the layers after them, in order of execution, for `patience` steps (3 when below
      `extreme`), and not recovering. AUTOTRAINER takes 1e-3 for the first layer over the last; healthy deep networks
      pass through that in their first steps, none went below 1e-4. Once found, by whatever sign, it holds
      until all norms are above ten times `ratio`, also while the loss falls: later layers learn without the first.
    - *collapse* (warning): the global norm fell below `collapse` times its usual size while the loss has hardly fallen,
      or is stuck above half of where it began although it differs between batches.
    - *drift* (warning): as in `Exploding`, downwards.

    A network that converges is not vanishing: once the loss has fallen by `learnt` of its first value, depth is no new
    sign, and a fall that all layers share is none ever. Frozen and unused layers have no gradient and are passed over;
    exact zeros belong to `Dead`. Scaling all gradients changes nothing.

    Args:
        ratio: Norm over the largest norm of later layers.
        extreme: The same, for a verdict after three steps.
        patience: Steps in a row.
        collapse: Global norm over its highest baseline.
        decay: Nats per step of a drift.
        rise: Nats over the 48 steps of the window.
        certainty: Slope over its standard error.
        learnt: Share of the first loss whose loss is proof of learning.
        calm: Steps without a sign until the finding resolves.

    False alarms: without a logged loss, networks that escape a vanishing start by themselves (Adam lifts some small
    initialisations in hundreds of steps); two subnetworks of very different scale that follow each other in depth.
    """

    ratio: float = threshold(1e-4, above=0.0, most=1.0)
    extreme: float = threshold(1e-7, above=0.0, most=1.0)
    patience: int = threshold(10, least=1)
    collapse: float = threshold(0.01, above=0.0, most=1.0)
    decay: float = threshold(0.02, above=0.0)
    rise: float = threshold(1.1, above=0.0)
    certainty: float = threshold(8.0, above=0.0)
    learnt: float = threshold(0.1, above=0.0, most=1.0)

    rule: ClassVar[str] = "vanishing"
    rules: ClassVar[tuple[str, ...]] = ("vanishing",)
    low_count = Kept(0)
    low_since = Kept(0)
    first_gap = Kept(0.0)
    starved = Kept(False)
    down_count = Kept(0)
    drift = Part(Drift)

    def look(self, now: Signals) -> Sign | None:
        """A sign while gradients are vanishing."""
        return self._depth(now) or self._collapse(now) or self._drift(now)

    def _depth(self, now: Signals) -> Sign | None:
        gap, worst = now.profile.gap, now.profile.deepest
        self.starved = self.starved and self.life.open
        enough = self.ratio * RELIEF if self.starved else self.ratio
        if worst < -math.log(enough) or (now.course.fallen > self.learnt and not self.life.open):
            self.low_count = 0
            return None
        self.low_count += 1
        if self.low_count == 1:
            self.low_since, self.first_gap = now.step, worst
        extreme = worst > -math.log(self.extreme)
        if self.low_count < (3 if extreme else self.patience):
            return None
        if not self.life.open and worst < 0.8 * self.first_gap:
            return None
        with np.errstate(invalid="ignore"):
            layers = gap > -math.log(self.ratio)
        stuck = extreme and now.index >= 50 and now.course.fallen < 0.02 and now.course.known
        severity: Severity = "critical" if stuck else "warning"
        self.starved = True
        return Sign(
            severity=severity,
            badness=worst,
            value=math.exp(-worst),
            threshold=self.ratio,
            layers=layers,
            scores=np.nan_to_num(gap, nan=-math.inf),
            since=self.low_since,
            facts=lambda: {
                "sign": "depth",
                "slope": now.profile.slope,
                "fit": now.profile.fit,
                "norm": wording.exp(float(now.profile.height[int(np.nanargmax(gap))])),
                "largest_norm": wording.exp(float(np.fmax.reduce(now.profile.height))),
                "loss_fallen": now.course.fallen if now.course.known else None,
            },
        )

    def _collapse(self, now: Signals) -> Sign | None:
        course = now.course
        down = now.peak - now.total_level
        stuck = course.fallen < 0.02 or (
            course.best > 0.5 * course.start > 0
            and now.step - course.best_step > 50
            and course.noise > 1e-3 * course.scale
        )
        if not down > -math.log(self.collapse) or not course.known or not stuck:
            self.down_count = 0
            return None
        self.down_count += 1
        if self.down_count < self.patience:
            return None
        return Sign(
            severity="warning",
            badness=down,
            value=math.exp(-down),
            threshold=self.collapse,
            since=now.step - self.down_count + 1,
            facts=lambda: {"sign": "collapse", "norm": wording.exp(now.total_level), "usual_norm":
            wording.exp(now.peak),
                           "loss_fallen": course.fallen},
        )  # fmt: skip

    def _drift(self, now: Signals) -> Sign | None:
        trend, drift = now.trend, self.drift
        if trend.fresh:
            drift.follow(trend, growth=-self.decay, rise=self.rise, certainty=self.certainty)
        alone = len(drift.active) < LEAST_LAYERS
        if not drift.any or (alone and now.course.fallen > self.learnt):
            return None
        slope = float(np.fmin.reduce(np.where(drift.active, trend.slope, math.inf)))
        return Sign(
            severity="info" if alone and not now.course.known else "warning",
            badness=-slope * WINDOW,
            value=math.expm1(slope),
            threshold=math.expm1(-self.decay),
            layers=drift.active,
            scores=-trend.slope * WINDOW,
            since=max(0, now.step - WINDOW + 1),
            facts=lambda: drift_facts(slope, now, drift.active),
        )

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts, place = finding.evidence, wording.where(finding)
        since = f"since step {finding.first_step}"
        if facts.get("sign") == "drift":
            return wording.drift("shrink", place, finding)
        if facts.get("sign") == "collapse":
            return (
                f"All gradients have fallen to {finding.value:.2g} of their usual norm {since} "
                f"although the loss has hardly moved."
            )
        said = f"Gradients vanish{place} {since}: {finding.value:.2g} of the norm of the layers after it."
        fallen = facts.get("loss_fallen") or 0.0
        return f"{said} The loss has fallen by {fallen:.0%} all the same." if fallen > self.learnt else said
