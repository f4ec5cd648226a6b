"""From what gradwatch says to the words of the labels."""

from __future__ import annotations

from gradwatch.records import Finding

#: Rule to the classes of fault that it names; `imbalance` names one by its direction.
CLASSES: dict[str, tuple[str, ...]] = {
    "nonfinite": ("nan",),
    "exploding": ("exploding",),
    "divergence": ("exploding",),
    "spike": ("exploding",),
    "update_ratio": ("exploding",),
    "vanishing": ("vanishing",),
    "saturation": ("vanishing",),
    "underflow": ("vanishing", "zero_gradient"),
    "dead": ("zero_gradient", "dying_relu"),
    "unused": ("zero_gradient",),
    "dying_relu": ("dying_relu",),
    "plateau": ("stalled",),
    "stall": ("stalled",),
    "oscillation": ("oscillating",),
}

#: Causes of `gradwatch.diagnosis` that say the same as a cause of the labels.
ALSO_RIGHT: dict[str, tuple[str, ...]] = {
    "learning_rate": ("killed_units",),  # "the learning rate is too high: large steps pushed ReLU units below zero"
}


def classes_of(finding: Finding) -> tuple[str, ...]:
    """The classes of fault that a finding names; none for a rule of the user's own."""
    if finding.rule == "imbalance":
        return ("exploding",) if finding.evidence.get("direction") == "grow" else ("vanishing",)
    return CLASSES.get(finding.rule, ())


def names_cause(finding: Finding, causes: tuple[str, ...]) -> bool:
    """Whether the finding's cause, by its id in `gradwatch.diagnosis`, is one of `causes`."""
    right = {*causes, *(other for cause in causes for other in ALSO_RIGHT.get(cause, ()))}
    return finding.evidence.get("cause_id") in right
