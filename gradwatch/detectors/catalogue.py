"""All built-in rules by name."""

from __future__ import annotations

from gradwatch.detectors.depth import Imbalance
from gradwatch.detectors.growth import Exploding, Spike
from gradwatch.detectors.loss_rules import Divergence, Oscillation, Plateau
from gradwatch.detectors.nonfinite import NonFinite
from gradwatch.detectors.precision import Underflow
from gradwatch.detectors.rule import Rule
from gradwatch.detectors.silent import Dead, Unused
from gradwatch.detectors.units import DyingReLU, Saturation
from gradwatch.detectors.updates import Stall, UpdateRatio
from gradwatch.detectors.vanishing import Vanishing

CATALOGUE: dict[str, type[Rule]] = {
    rule.rule: rule
    for rule in (
        NonFinite, Exploding, Vanishing, Spike, Dead, Imbalance, UpdateRatio, Saturation, DyingReLU,
        Divergence, Plateau, Oscillation, Underflow, Unused, Stall,
    )
}  # fmt: skip
