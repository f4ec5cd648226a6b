"""Gradients that flush to zero in half precision, and a loss scale that cannot keep them from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import FloatArray, Kept, PerLayer
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import SAMPLE, SCALE, Signals
from gradwatch.records import NOT_MEASURED, Finding, Severity

#: Data types whose small numbers are coarse: below 6e-8 a float16 is zero.
HALF = ("float16", "half")


@dataclass(kw_only=True, eq=False)
class Underflow(Rule):
    """A large share of a float16 layer's gradient entries is exactly zero, or the loss scale has collapsed.

    Numbers below 6e-8 are zero in float16. From the sampled share of zeros; info above `share`, a warning above
    `alarm_share`. bfloat16 has the range of float32 and does not underflow; its lost updates are `Stall`'s.

    A dynamic loss scale (`torch.amp.GradScaler`) is there to lift gradients above that limit. It is halved at every
    overflow; once it falls below 1 it pushes gradients down instead: something overflows that no scale can mend, and
    everything else underflows.

    Args:
        share: Share of zero entries in a layer.
        alarm_share: Share for a warning.
        least_scale: A warning when the scale falls below this; 1 is the smallest that DeepSpeed allows
            (`min_loss_scale`).
        lost_scale: Critical when it falls below this, where fairseq gives up (`--min-loss-scale`).
        samples: Samples in a row.
        calm: Steps without a sign until the finding resolves.

    False alarms: embeddings in float16, most of whose rows have no gradient in a step; ReLU layers that die. A scale
    that begins below `least_scale` was meant so and is left alone.
    """

    share: float = threshold(0.3, above=0.0, most=1.0)
    alarm_share: float = threshold(0.5, above=0.0, most=1.0)
    least_scale: float = threshold(1.0, above=0.0)
    lost_scale: float = threshold(1e-4, above=0.0)
    samples: int = threshold(2, least=1)
    calm: int = threshold(30, least=1)

    rule: ClassVar[str] = "underflow"
    rules: ClassVar[tuple[str, ...]] = ("underflow",)
    wakes_on: ClassVar[int] = SAMPLE | SCALE
    count = PerLayer(0)
    shares = PerLayer(0.0)
    since = Kept(0)
    highest_scale = Kept(0.0)

    def prepare(self, context: RunContext) -> None:
        """See `Remembers.prepare`."""
        self._size = np.array([p.size if p.dtype in HALF else 0 for p in context.parameters], dtype=np.float64)

    def look(self, now: Signals) -> Sign | None:
        """A sign while too many entries are zero or the loss scale is too small."""
        values = now.samples.get("zero_fraction")
        if values is not None and self._size.any():
            self._sample(now, np.asarray(values, dtype=np.float64))
        self.highest_scale = max(self.highest_scale, now.scale)
        if 0 <= now.scale < self.least_scale <= self.highest_scale:
            return self._collapsed(now)
        layers = self.count >= self.samples
        if not layers.any():
            return None
        worst = float(self.shares[layers].max())
        severity: Severity = "warning" if worst >= self.alarm_share else "info"
        return Sign(
            severity=severity, badness=worst * 10, value=worst, threshold=self.share, layers=layers,
            scores=self.shares, since=self.since, facts=lambda: {"layers": int(layers.sum())},
        )  # fmt: skip

    def _collapsed(self, now: Signals) -> Sign:
        return Sign(
            severity="critical" if now.scale < self.lost_scale else "warning",
            badness=-math.log(max(now.scale, 1e-300)), value=now.scale, threshold=self.least_scale,
            facts=lambda: {"sign": "scale", "highest_scale": self.highest_scale},
        )  # fmt: skip

    def _sample(self, now: Signals, values: FloatArray) -> None:
        places, n = self.context.layers.of_parameter, len(self.context.layers)
        sizes = np.where(values == NOT_MEASURED, 0.0, self._size)
        zeros = np.bincount(places, np.where(sizes > 0, values, 0.0) * sizes, n)
        total = np.bincount(places, sizes, n)
        self.shares = np.divide(zeros, total, out=np.zeros(n), where=total > 0)
        low = self.shares > self.share
        if low.any() and not self.count.any():
            self.since = now.step
        self.count = np.where(low, self.count + 1, 0)

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        if finding.evidence.get("sign") == "scale":
            return (
                f"The loss scale fell from {finding.evidence['highest_scale']:g} to {finding.value:g}, at step "
                f"{finding.first_step} below {finding.threshold:g}: gradients overflow at every larger scale."
            )
        names = ", ".join(repr(name) for name in finding.layers[:3])
        more = f" and {len(finding.layers) - 3} more layers" if len(finding.layers) > 3 else ""
        return (
            f"{finding.value:.0%} of the gradient entries of {names}{more} are exactly zero in half precision "
            f"since step {finding.first_step}: they are too small for the data type."
        )
