"""Rules about the loss: divergence, plateau, oscillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import Signals
from gradwatch.records import Finding, Severity


@dataclass(kw_only=True, eq=False)
class Divergence(Rule):
    """The loss rises far above its best, or above where it began, and stays there."""

    ratio: float = threshold(3.0, above=1.0)
    blow_up: float = threshold(10.0, above=1.0)
    patience: int = threshold(5, least=1)

    rule: ClassVar[str] = "divergence"
    rules: ClassVar[tuple[str, ...]] = ("divergence",)
    since = Kept(-1)
    count = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while the loss is out."""
        course, loss = now.course, now.loss
        if not math.isfinite(loss) or course.seen < 2:
            return None
        floor = 10 * course.noise
        above_start = (loss - course.start) / course.scale
        high = loss > course.start + (self.ratio - 1) * abs(course.start) + floor
        if not high:
            self.count = 0
            return None
        self.count += 1
        if self.count == 1:
            self.since = now.step
        blown = above_start > self.blow_up
        if self.count < self.patience and not blown:
            return None
        severity: Severity = "critical" if blown or self.count >= 4 * self.patience else "warning"
        return Sign(
            severity=severity,
            badness=math.log(1 + above_start),
            value=loss,
            threshold=course.start + (self.ratio - 1) * abs(course.start) + floor,
            since=self.since,
            facts=lambda: {"first_loss": course.start, "best_loss": course.best, "best_step": course.best_step},
        )

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        return (
            f"The loss diverges since step {finding.first_step}: {finding.value:.4g}, "
            f"against {facts.get('first_loss', math.nan):.4g} at the start and {facts.get('best_loss', math.nan):.4g} "
            f"at its best (step {facts.get('best_step', 0)})."
        )
