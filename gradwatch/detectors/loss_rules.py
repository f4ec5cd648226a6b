"""Rules about the loss: divergence, plateau, oscillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept
from gradwatch.detectors.recent import SPAN
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import Signals
from gradwatch.records import Finding, Severity


@dataclass(kw_only=True, eq=False)
class Divergence(Rule):
    """The loss rises far above where it began and stays there, or rises in a straight line together with the gradient."""

    ratio: float = threshold(3.0, above=1.0)
    blow_up: float = threshold(10.0, above=1.0)
    patience: int = threshold(5, least=1)
    certainty: float = threshold(6.0, above=0.0)

    rule: ClassVar[str] = "divergence"
    rules: ClassVar[tuple[str, ...]] = ("divergence",)
    since = Kept(0)
    count = Kept(0)
    rising = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while the loss is out or rises."""
        if not math.isfinite(now.loss) or now.course.seen < 2:
            return None
        return self._level(now) or self._growth(now)

    def _level(self, now: Signals) -> Sign | None:
        course, loss = now.course, now.loss
        limit = course.start + (self.ratio - 1) * abs(course.start) + 10 * course.noise
        if loss <= limit:
            self.count = 0
            return None
        self.count += 1
        if self.count == 1:
            self.since = now.step
        above = (loss - course.start) / course.scale
        blown = above > self.blow_up
        if self.count < self.patience and not blown:
            return None
        severity: Severity = "critical" if blown or self.count >= 4 * self.patience else "warning"
        return Sign(
            severity=severity, badness=math.log1p(above), value=loss, threshold=limit, since=self.since,
            facts=lambda: {"sign": "level", "first_loss": course.start, "best_loss": course.best,
                           "best_step": course.best_step},
        )  # fmt: skip

    def _growth(self, now: Signals) -> Sign | None:
        course, line = now.course, now.course.recent
        change = line.slope * SPAN
        rising = (
            line.certainty > self.certainty
            and change > 0.1 * course.scale
            and now.totals.slope > 0
            and now.totals.certainty > self.certainty / 2
        )
        self.rising = self.rising + 1 if rising else 0
        if self.rising < 2:
            return None
        return Sign(
            severity="warning", badness=change / course.scale, value=now.loss, threshold=course.best,
            since=max(0, now.step - SPAN - self.rising + 2),
            facts=lambda: {"sign": "growth", "first_loss": course.start, "best_loss": course.best,
                           "best_step": course.best_step, "per_step": line.slope},
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        first, best = facts.get("first_loss", math.nan), facts.get("best_loss", math.nan)
        verb = "rises steadily" if facts.get("sign") == "growth" else "diverges"
        return (
            f"The loss {verb} since step {finding.first_step}: {finding.value:.4g}, against {first:.4g} at the start "
            f"and {best:.4g} at its best (step {facts.get('best_step', 0)})."
        )


@dataclass(kw_only=True, eq=False)
class Plateau(Rule):
    """The loss has not improved for many steps."""

    patience: int = threshold(500, least=10)
    learnt: float = threshold(0.03, above=0.0, most=1.0)

    rule: ClassVar[str] = "plateau"
    rules: ClassVar[tuple[str, ...]] = ("plateau",)

    def look(self, now: Signals) -> Sign | None:
        """A sign while there is no new best."""
        course = now.course
        if course.seen < self.patience or now.step - course.best_step < self.patience // 2:
            return None
        severity: Severity = "warning" if course.fallen < self.learnt else "info"
        if severity == "info" and now.step - course.best_step < self.patience:
            return None
        stale = now.step - course.best_step
        return Sign(
            severity=severity, badness=math.log(stale), value=float(stale), threshold=float(self.patience),
            since=course.best_step, facts=lambda: {"loss": course.fast, "best_loss": course.best,
                                                   "first_loss": course.start, "loss_fallen": course.fallen},
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        return (
            f"The loss has not improved since step {finding.first_step} ({finding.value:.0f} steps): "
            f"{facts.get('loss', math.nan):.4g}, best {facts.get('best_loss', math.nan):.4g}."
        )


@dataclass(kw_only=True, eq=False)
class Oscillation(Rule):
    """The loss jumps up and down from step to step without falling."""

    alternation: float = threshold(0.5, above=0.0, most=1.0)
    patience: int = threshold(10, least=1)

    rule: ClassVar[str] = "oscillation"
    rules: ClassVar[tuple[str, ...]] = ("oscillation",)
    count = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while the loss alternates."""
        course = now.course
        if course.seen < 10 or course.alternation < self.alternation or course.noise < 1e-3 * course.scale:
            self.count = 0
            return None
        self.count += 1
        if self.count < self.patience:
            return None
        severity: Severity = "warning" if course.fallen < 0.1 and not course.falling else "info"
        return Sign(
            severity=severity, badness=course.alternation * 3, value=course.alternation, threshold=self.alternation,
            since=now.step - self.count + 1,
            facts=lambda: {"amplitude": course.noise, "loss": course.fast},
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        return (
            f"The loss jumps up and down at every step since step {finding.first_step}, by "
            f"{facts.get('amplitude', math.nan):.3g} around {facts.get('loss', math.nan):.3g}."
        )
