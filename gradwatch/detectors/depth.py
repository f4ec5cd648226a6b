"""Layers out of balance: gradients that grow or shrink over depth, a layer whose weights are out of scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept
from gradwatch.detectors.profile import OPENING
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.scales import LARGE, SMALL
from gradwatch.detectors.signals import Signals
from gradwatch.diagnosis.phrases import times
from gradwatch.records import Finding, Severity


@dataclass(kw_only=True, eq=False)
class Imbalance(Rule):
    """Log norms lie on a straight line over depth (in order of execution), or the weights of a layer are out of scale.

    On a line each layer multiplies the gradient: info from a factor of `ratio` from end to end on. A warning when
    gradients grow towards the input and the line is there at the first step (the initialisation is to blame:
    mean-field theory has norms scale as chi^depth, Poole 2016, Schoenholz 2017) or spans `alarm_ratio`; critical
    when it spans `critical_ratio` at the first step. Gradients that shrink towards the input are `Vanishing`'s to
    alarm about.

    A layer is out of scale (a warning) when the root mean square of its weights times the root of their inputs,
    alike in all layers after variance scaling (Glorot, He), is 30 times the median of the others and updates change
    it ten times less than them, or when it is a thousandth of the median; until it is within a factor of 10, or of
    30 where the loss falls and 3 where it does not. Only linear, convolution and dense layers count. Policies begin
    their last layer at 1/140 on purpose.

    Args:
        ratio: Factor from the last to the first layer along the line.
        alarm_ratio: The same, later than the first steps, for a warning. Trained tanh networks reach several hundred.
        critical_ratio: The same at the first step.
        fit: R squared of the line.
        layers: Layers that it takes to call it a line.
        patience: Steps in a row, after the first steps.
        calm: Steps without a sign until the finding resolves.

    False alarms: none in the runs measured; models whose parts run in parallel have no depth in this sense.
    """

    ratio: float = threshold(200.0, above=1.0)
    alarm_ratio: float = threshold(1e4, above=1.0)
    critical_ratio: float = threshold(500.0, above=1.0)
    fit: float = threshold(0.8, above=0.0, most=1.0)
    layers: int = threshold(6, least=3)
    patience: int = threshold(10, least=1)

    rule: ClassVar[str] = "imbalance"
    rules: ClassVar[tuple[str, ...]] = ("imbalance",)
    count = Kept(0)
    since = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while the profile is a steep line or a layer's weights are out of scale."""
        is_scale = self.life.open and self.life.evidence.get("sign") == "scale"
        line = None if is_scale else self._line(now)
        is_line = line is not None or (self.life.open and not is_scale)
        return line if is_line or not now.scales.odd else self._scale(now)

    def _scale(self, now: Signals) -> Sign:
        odd, factor = now.scales.odd, now.scales.factor
        layers = np.array([name == odd for name in now.context.layers.names])
        others = float(np.nanmedian(now.pace.ratio[~layers]))
        is_early = now.index < OPENING
        return Sign(
            severity="warning", badness=abs(math.log(factor)), value=factor, layers=layers,
            threshold=LARGE if factor > 1 else 1 / SMALL, since=now.step - now.index if is_early else None,
            facts=lambda: {
                "sign": "scale", "first_bad_layer": odd,
                "ratio": float(now.pace.ratio[layers][0]), "other_ratio": others,
                "direction": "grow" if factor > 1 else "shrink", "at_start": is_early,
            },
        )  # fmt: skip

    def _line(self, now: Signals) -> Sign | None:
        profile = now.profile
        if len(now.logs) < self.layers or abs(profile.drop) < math.log(self.ratio) or profile.fit < self.fit:
            self.count = 0
            return None
        self.count += 1
        if self.count == 1:
            self.since = now.step
        growing = profile.slope < 0
        at_start = now.index < 3 and growing
        if self.count < self.patience and not at_start:
            return None
        grave = growing and (at_start or abs(profile.drop) > math.log(self.alarm_ratio))
        certain = at_start and profile.fit > 0.9 and -profile.drop > math.log(self.critical_ratio)
        severity: Severity = "critical" if certain else "warning" if grave else "info"
        return Sign(
            severity=severity,
            badness=abs(profile.drop),
            value=math.exp(-profile.slope),
            threshold=self.ratio ** (1 / max(1, len(now.logs) - 1)),
            layers=np.ones(len(now.logs), dtype=bool),
            scores=np.nan_to_num(profile.height, nan=-math.inf),
            since=self.since,
            facts=lambda: {
                "slope": profile.slope, "fit": profile.fit, "factor": math.exp(min(abs(profile.drop), 700)),
                "direction": "grow" if profile.slope < 0 else "shrink", "at_start": self.since < 3,
            },
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        if facts.get("sign") == "scale":
            odd = facts.get("first_bad_layer")
            return (
                f"The weights of {odd!r} are {times(finding.value)} than those of the other layers, "
                f"measured for their shape: an update moves it by {facts.get('ratio', math.nan):.1g} of its norm, "
                f"the others by {facts.get('other_ratio', math.nan):.1g}."
            )
        verb = "grow" if facts.get("direction") == "grow" else "shrink"
        return (
            f"Gradients {verb} {finding.value:.3g} times per layer towards the input since step {finding.first_step}: "
            f"a factor of {facts.get('factor', math.nan):.2g} over {len(finding.layers)} layers "
            f"(straight line over depth, R² {facts.get('fit', math.nan):.2f})."
        )
