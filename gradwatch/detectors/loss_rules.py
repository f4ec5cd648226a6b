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

#: A loss this share of its first value above its best does not stand still: it has diverged.
FAR = 1.0
#: So much of the first loss may be lost by the first steps alone, such as the output's bias, before anything is learnt.
EARLY = 0.1


@dataclass(kw_only=True, eq=False)
class Divergence(Rule):
    """The loss leaves where it began, upwards, or climbs from its best and stays there.

    Signs:

    - *level*: above `ratio` times the first loss, and ten times its usual change, `patience` steps in a row (warning),
      or above `blow_up` times at once (critical).
    - *relapse*: its mean is `relapse` of the first loss above its best, beyond twice the noise, and not falling, for
      `relapse_patience` steps (warning); critical when it is `blow_up` times the first.
    - *growth* (warning): sixteen losses on a line (t >= `certainty`) that rises by 15 % of the first loss, and the
      gradient norm rises with them.

    The first loss is the lower median of five, so the scale of a loss does not matter and a negative one will do.

    Args:
        ratio: Factor over the first loss. (Others take 1.5 to 2 over a minimum or a mean, which noise reaches.)
        blow_up: Factor for a critical verdict, the usual definition of a failed run.
        patience: Steps in a row above `ratio`.
        relapse: Share of the first loss above the best.
        relapse_patience: Steps for which that holds. A new curriculum leaps and then falls; this does not fall.
        certainty: Slope over its standard error.
        calm: Steps without a sign until the finding resolves.

    False alarms: a loss whose definition changes in mid-run.
    """

    ratio: float = threshold(3.0, above=1.0)
    blow_up: float = threshold(10.0, above=1.0)
    patience: int = threshold(5, least=1)
    relapse: float = threshold(0.5, above=0.0)
    relapse_patience: int = threshold(15, least=1)
    certainty: float = threshold(6.0, above=0.0)

    rule: ClassVar[str] = "divergence"
    rules: ClassVar[tuple[str, ...]] = ("divergence",)
    high = Kept(0)
    lapsed = Kept(0)
    rising = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while the loss is out or rises."""
        if not math.isfinite(now.loss) or now.course.seen < 2:
            return None
        course, loss = now.course, now.loss
        start, spread = course.start, abs(course.start)
        self.high = self.high + 1 if loss > start + (self.ratio - 1) * spread + 10 * course.noise else 0
        lapsed = course.above_best > self.relapse and course.fast - course.best > 2 * course.noise
        self.lapsed = self.lapsed + 1 if lapsed and not course.recent.slope < 0 else max(0, self.lapsed - 1)
        self.rising = self.rising + 1 if self._rises(now) else 0
        blown = loss > start + (self.blow_up - 1) * max(spread, 10 * course.noise)
        far = course.fast > start + (self.blow_up - 1) * spread and course.fast > start + 2 * course.noise
        if blown or self.high >= self.patience:
            return self._sign(now, "level", self.high, grave=blown or far or self.high >= 4 * self.patience)
        if self.lapsed >= self.relapse_patience or (far and course.seen > self.patience):
            return self._sign(now, "relapse", self.lapsed, grave=far)
        return self._sign(now, "growth", SPAN + self.rising - 2, grave=False) if self.rising >= 3 else None

    def _rises(self, now: Signals) -> bool:
        line = now.course.recent
        steep = line.certainty > self.certainty and line.slope * SPAN > 0.15 * now.course.scale
        return steep and now.totals.slope > 0 and now.totals.certainty > self.certainty / 2

    def _sign(self, now: Signals, sign: str, steps: int, *, grave: bool) -> Sign:
        course = now.course
        above = max((max(course.fast, now.loss) - course.start) / course.scale, course.above_best)
        return Sign(
            severity="critical" if grave else "warning",
            badness=math.log1p(max(above, 0.0)),
            value=now.loss,
            threshold=course.best if sign != "level" else course.start + (self.ratio - 1) * abs(course.start),
            since=max(0, now.step - max(steps, 1) + 1),
            facts=lambda: {
                "sign": sign,
                "first_loss": course.start,
                "best_loss": course.best if math.isfinite(course.best) else None,
                "best_step": course.best_step,
                "mean_loss": course.fast,
            },
        )

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        first, best = facts.get("first_loss", math.nan), facts.get("best_loss")
        verb = {"growth": "rises steadily", "relapse": "has risen"}.get(facts.get("sign", ""), "diverges")
        at_best = f" and {best:.4g} at its best (step {facts.get('best_step', 0)})" if best is not None else ""
        return (
            f"The loss {verb} since step {finding.first_step}: {finding.value:.4g}, "
            f"against {first:.4g} at the start{at_best}."
        )


@dataclass(kw_only=True, eq=False)
class Plateau(Rule):
    """The loss has not improved for many steps.

    A warning when it never has: less than `learnt` of the first loss was lost in `patience` steps, or since step 50
    where it lost less than a tenth until then, and the mean loss stays within its noise since. Not while the loss
    is far above its best, which is `Divergence`. Info when it has learnt before and then stopped: that is how
    training ends. Patience is long because healthy networks stand on plateaus of hundreds of steps at their start.
    (SageMaker's LossNotDecreasing: 10 steps.)

    Args:
        patience: Steps.
        learnt: Share of the first loss.
        calm: Steps without a sign until the finding resolves.

    False alarms: players of a game (GANs) whose losses hold each other still within their noise.
    """

    patience: int = threshold(500, least=10)
    learnt: float = threshold(0.03, above=0.0, most=1.0)

    rule: ClassVar[str] = "plateau"
    rules: ClassVar[tuple[str, ...]] = ("plateau",)

    def look(self, now: Signals) -> Sign | None:
        """A sign while there is no new best."""
        course = now.course
        if course.seen < self.patience or now.step - course.best_step < self.patience // 2 or course.above_best > FAR:
            return None
        flat = course.worst - course.best < 2 * course.noise + 0.01 * course.scale and course.noise < 0.3 * course.scale
        little = course.fallen < self.learnt or (course.fallen < EARLY and course.fallen_late < self.learnt)
        severity: Severity = "warning" if little and flat else "info"
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
    """The loss jumps up and down from step to step.

    Its deviations from the running mean have a correlation below -`alternation` with those one step before, and above
    it with those two steps before: the period of two that gradient descent has at the edge of stability, learning rate
    times sharpness > 2 (Cohen 2021). Info; a warning when the jumps grow by `growth` and the loss does not fall.

    Args:
        alternation: Correlation, 0 to 1. Noise has none at lag two.
        growth: Factor by which the jumps grew since they began.
        patience: Steps in a row.
        calm: Steps without a sign until the finding resolves.

    False alarms: batches that alternate between two sources; their jumps do not grow.
    """

    alternation: float = threshold(0.5, above=0.0, most=1.0)
    growth: float = threshold(2.0, above=1.0)
    patience: int = threshold(10, least=1)

    rule: ClassVar[str] = "oscillation"
    rules: ClassVar[tuple[str, ...]] = ("oscillation",)
    count = Kept(0)
    amplitude = Kept(0.0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while the loss alternates."""
        course = now.course
        if course.seen < 10 or course.alternation < self.alternation or course.noise < 1e-3 * course.scale:
            self.count = 0
            return None
        self.count += 1
        if self.count < self.patience:
            return None
        if self.count == self.patience:
            self.amplitude = course.noise
        grows = course.noise > self.growth * self.amplitude
        severity: Severity = "warning" if grows and not course.falling else "info"
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
