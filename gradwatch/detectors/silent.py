"""Parameters whose gradient is exactly zero, or that never get one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept, PerLayer, PerParameter
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import DAMAGE, Signals
from gradwatch.records import NOT_MEASURED, Finding, Severity


@dataclass(kw_only=True, eq=False)
class Dead(Rule):
    """A layer's gradient is exactly zero for many steps: nothing it does reaches the loss.

    A warning; critical when every layer is at zero, for then nothing learns. A loss that has reached its floor (a
    hinge, a margin) has zero gradients too: info when the loss is known and small.

    Args:
        patience: Steps of zero gradient in a row.
        all_patience: The same when every layer is at zero and the loss is known. Zero-initialised last layers are at
            zero for one step.
        calm: Steps without a sign until the finding resolves.

    False alarms: layers used in some batches only, when unused for `patience` steps; without a logged loss, a hinge
    loss that has reached zero.
    """

    patience: int = threshold(15, least=1)
    all_patience: int = threshold(3, least=1)
    calm: int = threshold(5, least=1)

    rule: ClassVar[str] = "dead"
    rules: ClassVar[tuple[str, ...]] = ("dead",)
    wakes_on: ClassVar[int] = DAMAGE
    count = PerLayer(0)
    counting = Kept(False)

    def look(self, now: Signals) -> Sign | None:
        """A sign while layers are at zero."""
        if now.clean:
            if self.counting:
                self.count[:] = 0
            self.counting = self.follows = False
            return None
        self.counting = self.follows = True
        self.count = np.where(now.zero, self.count + 1, np.where(now.absent, self.count, 0))
        everything = bool((now.zero | now.absent).all()) and bool(now.zero.any())
        soon = everything and (now.course.known or int(self.count.max()) > now.index)
        layers = self.count >= (self.all_patience if soon else self.patience)
        if not layers.any():
            return None
        longest = int(self.count.max())
        severity: Severity = "critical" if everything and (now.course.known or longest > now.index) else "warning"
        if everything and (now.course.fallen > 0.9 or abs(now.loss) <= 0.05 * abs(now.course.start)):
            severity = "info"  # a loss with a floor, such as a hinge, that was reached
        return Sign(
            severity=severity, badness=math.log(longest), value=float(longest), threshold=float(self.patience),
            layers=layers, scores=self.count.astype(float), since=now.step - longest + 1,
            facts=lambda: {
                "first_bad_layer": "" if everything else self._source(),
                "all_layers": everything, "dead_layers": int(layers.sum()), "of_layers": len(layers),
                "from_start": longest > now.index, "loss_fallen": now.course.fallen if now.course.known else None,
            },
        )  # fmt: skip

    def _source(self) -> str:
        """The last layer among those that have been at zero longest: what it does not pass on, those before it lack."""
        return self.context.layers.names[int(np.flatnonzero(self.count == self.count.max())[-1])]

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        if facts.get("all_layers"):
            return f"Every gradient is exactly zero since step {finding.first_step}: nothing is being learnt."
        names = ", ".join(repr(name) for name in finding.layers[:3])
        more = f" and {len(finding.layers) - 3} more layers" if len(finding.layers) > 3 else ""
        return f"The gradient of {names}{more} is exactly zero since step {finding.first_step}."


@dataclass(kw_only=True, eq=False)
class Unused(Rule):
    """A trainable parameter never got a gradient: usually a layer that `forward` forgets, or a stray `.detach()`.

    A warning; info when the model is conditional (some parameters have a gradient at some steps only: experts,
    alternating optimizers). Frozen parameters do not count.

    Args:
        patience: Steps without any gradient from the start, while others have one.
        calm: Steps without a sign until the finding resolves.

    False alarms: layers that come into play in a later phase of training and were not frozen until then.
    """

    patience: int = threshold(30, least=2)

    rule: ClassVar[str] = "unused"
    rules: ClassVar[tuple[str, ...]] = ("unused",)
    wakes_on: ClassVar[int] = 0
    waiting = PerParameter(True)
    present = PerParameter(0)
    conditional = Kept(False)
    steps = PerParameter(0)
    done = Kept(False)

    def grow(self, context: RunContext) -> None:
        """Go on with more parameters."""
        super().grow(context)
        self.done = False

    def prepare(self, context: RunContext) -> None:
        """See `Remembers.prepare`."""
        self._trainable = np.array([p.trainable for p in context.parameters], dtype=bool)

    def look(self, now: Signals) -> Sign | None:
        """A sign while parameters wait for their first gradient."""
        self.follows = not self.done
        if self.done:
            return None
        missing = now.row == NOT_MEASURED
        if missing.all():
            return None
        self.conditional = self.conditional or bool((missing & (self.present > 0)).any())
        self.present += ~missing
        self.waiting &= missing
        self.waiting &= self._trainable
        if not self.waiting.any():
            self.done = True
            return None
        self.steps += 1
        late = self.waiting & (self.steps >= self.patience)
        if not late.any():
            return None
        layers = np.zeros(len(now.logs), dtype=bool)
        layers[self.context.layers.of_parameter[late]] = True
        names = [self.context.parameters[i].name for i in np.flatnonzero(late)]
        return Sign(
            severity="info" if self.conditional else "warning",
            badness=float(len(names)), value=float(len(names)), threshold=0.0, layers=layers,
            since=now.step - int(self.steps[late].max()) + 1,
            facts=lambda: {"parameters": names[:20], "count": len(names)},
        )  # fmt: skip

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        names, count = facts.get("parameters", ()), facts.get("count", 0)
        shown = ", ".join(repr(name) for name in names[:3]) + (f" and {count - 3} more" if count > 3 else "")
        return f"{shown} never got a gradient in {finding.last_step - finding.first_step + 1} steps."
