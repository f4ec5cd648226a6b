"""The likely cause behind a finding, and what to do about it."""

from __future__ import annotations

import dataclasses

from gradwatch.detectors.base import RunContext
from gradwatch.records import Finding

_ADVICE: dict[str, tuple[str, tuple[str, ...]]] = {
    "nonfinite": (
        "numbers left the range of the data type",
        (
            "lower the learning rate",
            "clip gradients to a global norm",
            "check the loss for log(0) and division by zero",
        ),
    ),
    "exploding": (
        "learning rate or initial weights too large",
        ("clip gradients to a global norm", "lower the learning rate", "use an initialisation for the activation"),
    ),
    "vanishing": (
        "the signal shrinks from layer to layer",
        ("replace saturating activations", "use Kaiming or Xavier initialisation", "add normalisation layers"),
    ),
    "spike": ("a single bad batch", ("look at the samples of this step", "clip gradients to a global norm")),
    "dead": (
        "the layer does not reach the loss",
        ("replace ReLU by LeakyReLU", "check the output layer"),
    ),
    "divergence": ("learning rate too high", ("lower the learning rate", "clip gradients to a global norm")),
}


def diagnosed(finding: Finding, context: RunContext) -> Finding:  # noqa: ARG001
    """The finding with cause and advice."""
    if finding.cause or finding.rule not in _ADVICE:
        return finding
    cause, advice = _ADVICE[finding.rule]
    return dataclasses.replace(finding, cause=cause, advice=advice)
