"""NaN and infinity in gradients, weights and the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gradwatch.detectors import wording
from gradwatch.detectors.life import Sign
from gradwatch.detectors.memory import Kept
from gradwatch.detectors.rule import Rule, threshold
from gradwatch.detectors.signals import DAMAGE, SAMPLE, Signals
from gradwatch.records import NOT_MEASURED, Finding, Severity


@dataclass(kw_only=True, eq=False)
class NonFinite(Rule):
    """A gradient, a weight or the loss is NaN or infinite.

    Critical at the first step whose update is taken: from there on the weights are lost. A step that was skipped keeps
    the weights whole: a warning. A step that a `GradScaler` skips is how mixed precision looks for its scale and no
    alarm, unless `scaler_patience` steps in a row are skipped. A batch that the loop itself left out, after a loss that
    was logged and not finite, is a warning too: it may come again every epoch.

    Says where it began: backward runs from the output to the input, so with a finite loss the deepest bad layer came
    first; a loss that is not finite came first itself.

    Args:
        scaler_patience: Consecutive steps skipped by a `GradScaler` before it is a warning. It starts at 2^16 and
            halves at each skip (PyTorch's default), so 25 skips mean that no scale will do.
        calm: Steps without a sign until the finding resolves.

    False alarms: none known.
    """

    scaler_patience: int = threshold(25, least=1)
    calm: int = threshold(20, least=1)

    rule: ClassVar[str] = "nonfinite"
    rules: ClassVar[tuple[str, ...]] = ("nonfinite",)
    wakes_on: ClassVar[int] = SAMPLE | DAMAGE
    scaler_skips = Kept(0)
    lost = Kept(0)

    def look(self, now: Signals) -> Sign | None:
        """A sign at every step at which something is not finite."""
        self.scaler_skips = self.scaler_skips + 1 if now.skipped == "grad_scaler" else 0
        self.follows = self.scaler_skips > 0
        weights = now.samples.get("weight_norm")
        bad_weights = weights is not None and not (np.isfinite(weights) | (weights == NOT_MEASURED)).all()
        bad_loss = now.has_loss and not math.isfinite(now.loss)
        bad_layers = not now.clean and bool(now.bad.any())
        if self.scaler_skips:
            if self.scaler_skips < self.scaler_patience:
                return None
        elif not (bad_layers or bad_loss or bad_weights or now.discarded):
            return None
        self.lost += 1
        is_taken = (bad_layers or bad_loss) and not now.skipped
        severity: Severity = "critical" if is_taken or bad_weights else "warning"
        scores = np.where(now.bad, np.arange(len(now.bad)), -1.0)
        return Sign(
            severity=severity,
            badness=float(now.bad.sum()) + bad_loss + bad_weights,
            value=now.loss if bad_loss else math.nan,
            threshold=math.inf,
            layers=now.bad,
            scores=scores,
            facts=lambda: self._facts(now, bad_loss, bad_weights),
        )

    def _facts(self, now: Signals, bad_loss: bool, bad_weights: bool) -> dict[str, Any]:
        if "where" in self.life.evidence and self.life.open and self.life.first != now.step:
            return {}
        names = now.context.layers.names
        finite = [names[i] for i in np.flatnonzero(~now.bad & ~now.absent)]
        bad = np.flatnonzero(now.bad)
        is_discarded = now.discarded and not (len(bad) or bad_weights)
        where = "loss" if bad_loss or is_discarded else "weights" if bad_weights and not len(bad) else "gradient"
        facts: dict[str, Any] = {
            "where": where,
            "direction": "forward" if bad_loss else "backward",
            "first_bad_layer": names[bad[-1]] if len(bad) and not bad_loss else "",
            "bad_layers": len(bad),
            "finite_layers": finite[:20],
            "finite_count": len(finite),
            "kind": "nan" if np.isnan(now.norms[bad]).any() or (bad_loss and math.isnan(now.loss)) else "inf",
            "skipped": "loop" if is_discarded and not bad_loss else now.skipped,
            "norm_before": _exp(now.total_level),
            "total_rise": None if math.isnan(now.total_rise) else now.total_rise,
        }
        outputs = now.samples.get("activation_mean")
        if outputs is not None:
            broken = ~np.isfinite(outputs) & (outputs != NOT_MEASURED)
            if broken.any():
                facts |= {"first_bad_module": now.modules[int(np.argmax(broken))], "direction": "forward"}
        if bad_weights:
            weights = now.samples["weight_norm"]
            broken = ~np.isfinite(weights) & (weights != NOT_MEASURED)
            facts["bad_weights"] = [self.context.parameters[i].name for i in np.flatnonzero(broken)[:10]]
        return facts

    def words(self, finding: Finding) -> str:
        """One sentence for a person."""
        facts = finding.evidence
        kind = "NaN" if facts.get("kind") == "nan" else "infinite"
        since = f"at step {finding.first_step}"
        if self.scaler_skips >= self.scaler_patience:
            return (
                f"The gradient scaler skipped {self.scaler_skips} steps in a row: no loss scale gives finite gradients."
            )
        if facts.get("skipped") == "loop":
            return f"A loss before step {finding.first_step} was not finite, and the loop took no step with it."
        if facts.get("where") == "loss":
            what = f"The loss became {kind} {since}, before any gradient"
        elif facts.get("where") == "weights":
            what = f"Weights became {kind} {since}: {', '.join(facts.get('bad_weights', ())[:3])}"
        else:
            what = f"The gradient became {kind} {since}, first in {facts.get('first_bad_layer')!r} (backward order)"
        more = f"; {wording.layers(facts['finite_count'])} still finite" if facts.get("finite_count") else ""
        kept = "; the step was skipped, the weights are unharmed" if finding.severity == "warning" else ""
        return f"{what}{more}{kept}."


def _exp(log: float) -> float | None:
    return math.exp(min(log, 700.0)) if math.isfinite(log) else None
