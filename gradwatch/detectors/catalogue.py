"""All built-in rules by name."""

from __future__ import annotations

from gradwatch.detectors.loss_rules import Divergence
from gradwatch.detectors.magnitude import Exploding, Spike, Vanishing
from gradwatch.detectors.nonfinite import NonFinite
from gradwatch.detectors.rule import Rule
from gradwatch.detectors.silent import Dead

CATALOGUE: dict[str, type[Rule]] = {
    rule.rule: rule for rule in (NonFinite, Exploding, Vanishing, Spike, Dead, Divergence)
}
