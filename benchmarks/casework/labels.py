"""From what gradwatch says to the words of the labels."""

from __future__ import annotations

import re

from gradwatch.records import Finding

#: Rule to the classes of fault that it names. `imbalance` and `update_ratio` name one or the other by their sign.
CLASSES: dict[str, tuple[str, ...]] = {
    "nonfinite": ("nan",),
    "exploding": ("exploding",),
    "divergence": ("exploding",),
    "spike": ("exploding",),
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

#: Cause of the labels to how the diagnosis words it.
CAUSES: dict[str, str] = {
    "learning_rate": r"learning rate (is |was )?(far |much )?too (high|large)|steps? (is |are )?too (large|long)",
    "learning_rate_small": r"learning rate (is |was )?(far |much )?too (low|small)",
    "weight_decay": r"weight decay",
    "init_large": r"(initial\w*|gain).*(too )?(large|high|big)|(large|high|big).*(initial\w*|gain)",
    "init_small": r"(initial\w*|gain).*(too )?(small|low)|(small|low).*(initial\w*|gain)|zero.*initial|initial.*zero",
    "saturating_activation": r"saturat|sigmoid|tanh",
    "activation": r"exponential|activation",
    "dying_relu": r"relu",
    "recurrence": r"recurren|spectral radius|bootstrap",
    "missing_normalisation": r"normali[sz]ation|without norm",
    "bad_batch": r"batch|sample",
    "half_overflow": r"overflow|float16|half precision|loss scale",
    "half_underflow": r"underflow|flush|rounds? to nothing|half precision|float16|bfloat16|loss scal",
    "loss_domain": r"log|division|divi(de|ding) by|root",
    "attention_logits": r"attention|softmax|logits",
    "unused_layers": r"unused|never (called|used|reach)|detach|not (part|connected)|does not reach|no path",
    "output_layer": r"output|softmax|single unit|one unit",
    "data_scale": r"(inputs?|targets?|data|labels?).*scal|scal.*(inputs?|targets?|data|labels?)",
    "gradients_not_cleared": r"zero_grad|accumulat|not cleared|never cleared",
}


def classes_of(finding: Finding) -> tuple[str, ...]:
    """The classes of fault that a finding names; none for a rule of the user's own."""
    if finding.rule == "update_ratio":
        return ("exploding",) if finding.value > finding.threshold else ("stalled", "vanishing")
    if finding.rule == "imbalance":
        return ("exploding", "vanishing")
    return CLASSES.get(finding.rule, ())


def names_cause(finding: Finding, causes: tuple[str, ...]) -> bool:
    """Whether the finding's cause is one of `causes`."""
    return any(re.search(CAUSES[cause], finding.cause, re.IGNORECASE) for cause in causes)
