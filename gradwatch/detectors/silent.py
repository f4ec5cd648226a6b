"""Parameters whose gradient is exactly zero, or that never get one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import PerLayer
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import Signals
from gradwatch.records import Finding, Severity


@dataclass(kw_only=True, eq=False)
class Dead(Rule):
    """A layer's gradient is exactly zero for many steps: nothing it does reaches the loss.

    Args:
        patience: Steps of zero gradient in a row.
        all_patience: The same when every layer is at zero: then nothing learns.

    False alarms: layers used in some batches only, when unused for `patience` steps.
    """

    patience: int = threshold(20, least=1)
    all_patience: int = threshold(3, least=1)

    rule: ClassVar[str] = "dead"
    rules: ClassVar[tuple[str, ...]] = ("dead",)
    count = PerLayer(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign while layers are at zero."""
        if now.clean and not self.life.open:
            self.count[:] = 0
            return None
        self.count = np.where(now.zero, self.count + 1, 0)
        everything = bool((now.zero | now.absent).all()) and bool(now.zero.any())
        layers = self.count >= (self.all_patience if everything else self.patience)
        if not layers.any():
            return None
        longest = int(self.count.max())
        severity: Severity = "critical" if everything else "warning"
        return Sign(
            severity=severity, badness=math.log(longest), value=float(longest), threshold=float(self.patience),
            layers=layers, scores=self.count.astype(float), since=now.step - longest + 1,
            facts=lambda: {"all_layers": everything, "dead_layers": int(layers.sum()), "of_layers": len(layers)},
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        if facts.get("all_layers"):
            return f"Every gradient is exactly zero since step {finding.first_step}: nothing is being learnt."
        names = ", ".join(repr(name) for name in finding.layers[:3])
        return f"The gradient of {names} is exactly zero since step {finding.first_step} ({finding.value:.0f} steps)."
