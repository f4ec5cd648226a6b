"""Units that are saturated or never active, from sampled outputs of activation modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import SAMPLE, Signals
from gradwatch.records import NOT_MEASURED, Finding, Severity


@dataclass(kw_only=True, eq=False)
class ShareOfUnits(Rule):
    """Base: a share of each module's units is in a bad state in several samples running."""

    limit: float = threshold(0.5, above=0.0, most=1.0)
    alarm_limit: float = threshold(0.9, above=0.0, most=1.0)
    samples: int = threshold(2, least=1)
    learnt: float = threshold(0.1, above=0.0, most=1.0)
    calm: int = threshold(30, least=1)

    wakes_on: ClassVar[int] = SAMPLE
    statistic: ClassVar[str]
    counts = Kept[dict[str, int]]({})
    shares = Kept[dict[str, float]]({})
    since = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while a module has too many such units."""
        values = now.samples.get(self.statistic)
        if values is not None:
            self._sample(now, values)
        worst = max((s for name, s in self.shares.items() if self.counts.get(name, 0) >= self.samples), default=0.0)
        if worst <= self.limit:
            return None
        learnt = now.course.fallen > self.learnt or (not now.course.known and self.since > 30)
        severity: Severity = "warning" if worst >= self.alarm_limit and not learnt else "info"
        return Sign(
            severity=severity, badness=worst * 10, value=worst, threshold=self.limit, since=self.since,
            facts=self._facts,
        )  # fmt: skip

    def _sample(self, now: Signals, values: Any) -> None:
        counts = {}
        for name, value in zip(now.modules, values.tolist(), strict=True):
            if value != NOT_MEASURED and value > self.limit:
                counts[name] = self.counts.get(name, 0) + 1
                self.shares[name] = value
        if counts and not self.counts:
            self.since = now.step
        self.counts = counts
        self.shares = {name: self.shares[name] for name in counts}

    def _facts(self) -> dict[str, Any]:
        ranked = sorted(self.shares, key=lambda name: -self.shares[name])
        return {"modules": ranked[:20], "shares": [round(self.shares[name], 4) for name in ranked[:20]]}

    def _list(self, finding: Finding) -> str:
        facts = finding.evidence
        pairs = list(zip(facts.get("modules", ()), facts.get("shares", ()), strict=False))
        more = f" and {len(pairs) - 3} more modules" if len(pairs) > 3 else ""
        return ", ".join(f"{share:.0%} of {name!r}" for name, share in pairs[:3]) + more


@dataclass(kw_only=True, eq=False)
class Saturation(ShareOfUnits):
    """Most outputs of a sigmoid, tanh or the like sit at their bounds, where the slope is nothing.

    From sampled forward hooks, when they are on. Info above `limit` of the outputs; a warning above `alarm_limit` while
    nothing was learnt. (SageMaker: tanh inputs outside ±9.5, half of a layer; TheDeepChecker: 0.85.)

    Args:
        limit: Share of a module's outputs.
        alarm_limit: Share for a warning.
        samples: Samples in a row.
        learnt: Share of the first loss whose loss is proof of learning.
        calm: Steps without a sign until the finding resolves.

    False alarms: gates and outputs of confident classifiers saturate in health; hence the gate on the loss.
    """

    rule: ClassVar[str] = "saturation"
    rules: ClassVar[tuple[str, ...]] = ("saturation",)
    statistic: ClassVar[str] = "saturated_fraction"

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        return f"Activations are saturated since step {finding.first_step}: {self._list(finding)}."


@dataclass(kw_only=True, eq=False)
class DyingReLU(ShareOfUnits):
    """Most units of a ReLU layer are zero for every sample of the batch.

    From sampled forward hooks, when they are on. Info above `limit` of the units (SageMaker's DeadRelu: 50 %); a
    warning above `alarm_limit` while nothing was learnt. Without hooks `Dead` sees whole layers die.

    Args:
        limit: Share of a module's units.
        alarm_limit: Share for a warning.
        samples: Samples in a row.
        learnt: Share of the first loss whose loss is proof of learning.
        calm: Steps without a sign until the finding resolves.

    False alarms: in batches of one sample half of all units are zero in health; that is info at most.
    """

    rule: ClassVar[str] = "dying_relu"
    rules: ClassVar[tuple[str, ...]] = ("dying_relu",)
    statistic: ClassVar[str] = "dead_fraction"

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        return f"ReLU units never fire since step {finding.first_step}: {self._list(finding)}."
