"""The words of a diagnosis: numbers of the run and terms of the framework, put into the templates of a cause."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from gradwatch.diagnosis.causes import Cause
from gradwatch.diagnosis.symptoms import BOUNDED, Symptoms

#: Word of the remedies to how a framework says it.
TERMS: dict[str, dict[str, str]] = {
    "": {
        "leaky": "LeakyReLU or PReLU",
        "kaiming": "Kaiming (He) initialisation",
        "xavier": "Xavier (Glorot) initialisation",
        "norm": "BatchNorm or LayerNorm",
        "clipping": "gw.Clip(max_norm={clip})",
        "logits": "a loss that takes logits",
        "detach": "a stop-gradient",
        "zero": "clear the gradients before each backward pass",
    },
    "torch": {
        "leaky": "nn.LeakyReLU or nn.PReLU",
        "kaiming": "nn.init.kaiming_normal_(w, nonlinearity='relu')",
        "xavier": "nn.init.xavier_uniform_(w, gain=nn.init.calculate_gain('tanh'))",
        "norm": "nn.BatchNorm or nn.LayerNorm",
        "clipping": "clip_grad_norm_(model.parameters(), {clip}) or gw.Clip(max_norm={clip})",
        "logits": "nn.BCEWithLogitsLoss or nn.CrossEntropyLoss on logits",
        "detach": "a .detach(), a no_grad() block or .data",
        "zero": "call optimizer.zero_grad() before each backward pass",
    },
    "keras": {
        "leaky": "keras.layers.LeakyReLU or PReLU",
        "kaiming": "kernel_initializer='he_normal'",
        "xavier": "kernel_initializer='glorot_uniform'",
        "norm": "keras.layers.BatchNormalization or LayerNormalization",
        "clipping": "global_clipnorm={clip} in the optimizer or gw.Clip(max_norm={clip})",
        "logits": "from_logits=True and no activation in the last layer",
        "detach": "ops.stop_gradient or trainable=False",
        "zero": "use a fresh GradientTape for each step",
    },
}

#: Norms above this many times the first are no measure of what is usual: the run was out of hand.
USUAL = 30.0
#: The largest slope of an activation.
SLOPES = {"Sigmoid": "0.25", "Tanh": "1", "Softsign": "1", "Hardtanh": "1", "Hardsigmoid": "0.17"}


def wording_of(cause: Cause, symptoms: Symptoms) -> str:
    """The cause in words."""
    return cause.words.format_map(_fields(symptoms, ""))


def advice_for(cause: Cause, symptoms: Symptoms, *, framework: str) -> tuple[str, ...]:
    """The cause's remedies whose numbers are known, in the framework's terms."""
    fields, lines = _fields(symptoms, framework), []
    for line in cause.advice:
        try:
            lines.append(line.format_map(fields))
        except KeyError:  # a number of this line is not known
            continue
    return tuple(lines)


def _fields(symptoms: Symptoms, framework: str) -> dict[str, str]:
    terms = TERMS.get(framework.partition("-")[0], TERMS[""])
    clip, below = _clip(symptoms)
    fields = {**terms, **_layers(symptoms), **_rates(symptoms), **_steps(symptoms), **_places(symptoms)}
    fields |= {"clip_call": terms["clipping"].format(clip=clip or "1.0")}
    if clip:
        fields |= {"clip": clip, "below": below}
    gain = math.exp(-symptoms.first_drop / max(1, len(symptoms.layers) - 1))
    fields["gain"] = f" (about {gain:.2g} a layer at the first step)" if abs(symptoms.first_drop) > 1 else ""
    fields["first_loss"] = _number(symptoms.first_loss) or "not known"
    fields["first_norm"] = _number(symptoms.first_norm) or "not known"
    return fields


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""


def _clip(symptoms: Symptoms) -> tuple[str, str]:
    """A norm to clip to, and the share of steps below it; empty where clipping is no help or nothing usual is known."""
    if symptoms.finding.rule == "nonfinite":
        return "", ""
    if symptoms.below_one >= 0.9:
        return "1.0", f"{symptoms.below_one:.0%}"
    usual = symptoms.norm_quantile < USUAL * symptoms.first_norm
    return (_rounded(symptoms.norm_quantile), "95%") if usual else ("", "")


def times(factor: float) -> str:
    """How many times larger or smaller something is, with the digits that count.

    Examples:
        >>> times(59.7), times(1 / 1023)
        ('60 times larger', '1,000 times smaller')
    """
    size = float(f"{max(factor, 1 / factor):.2g}")
    return f"{size:,.0f} times {'larger' if factor > 1 else 'smaller'}"


def _rounded(value: float) -> str:
    """One digit that counts, without an exponent where a person would write none."""
    rounded = float(f"{value:.0e}")
    return f"{rounded:.0f}" if 1 <= rounded < 1e5 else f"{rounded:g}"


def _rates(symptoms: Symptoms) -> dict[str, str]:
    fields = {"rate_now": "", "ratio": "", "earlier_rate": ""}
    if symptoms.rate > 0:
        rose = symptoms.rate > 1.2 * symptoms.rate_base > 0
        since = f", up from {symptoms.rate_base:.2g} since step {symptoms.rate_base_step + 1}"
        fields["rate_now"] = f" ({symptoms.rate:.2g}{since if rose else ''})"
    if symptoms.earlier_rate > 0:
        fields["earlier_rate"] = f" since step {symptoms.finding.first_step} (it was {symptoms.earlier_rate:.2g})"
    if symptoms.update_ratio > 0.03:
        fields["ratio"] = f": an update changed the weights by {symptoms.update_ratio:.0%} of their norm"
    if symptoms.rate_rising and symptoms.stable_rate > 0:
        fields |= {"safe_rate": f"{symptoms.stable_rate:.2g}", "stable_rate": f"{symptoms.stable_rate:.2g}"}
    return fields


def _layers(symptoms: Symptoms) -> dict[str, str]:
    names = symptoms.following(BOUNDED) or symptoms.finding.layers or symptoms.layers
    kinds = Counter(p.activation for p in symptoms.affected if p.activation in BOUNDED)
    kind = kinds.most_common(1)[0][0] if kinds else ""
    return {
        "layers": listing(names, symptoms.layers),
        "depth": "1 layer" if len(names) == 1 else f"{len(names)} layers",
        "activation": f" ({kind})" if kind else "",
        "activation_name": kind or "the saturating activation",
        "slope": SLOPES.get(kind, "1"),
    }


def _places(symptoms: Symptoms) -> dict[str, str]:
    """The layers and parameters that a cause points at."""
    before, after = symptoms.replaced_at
    return {
        "odd": repr(symptoms.odd_layer),
        "odd_times": times(symptoms.odd_factor),
        "replaced": listing(symptoms.replaced, tuple(p.name for p in symptoms.parameters)),
        "between": f"between steps {before} and {after}",
        "first_bad": repr(symptoms.evidence.get("first_bad_layer", "")),
        "last_finite": repr(symptoms.last_finite),
    }


def _steps(symptoms: Symptoms) -> dict[str, str]:
    steps = [int(step) for step in symptoms.evidence.get("steps", ())] or [symptoms.finding.first_step]
    fields = {"steps": str(steps[-1]), "steps_of": f"step {steps[-1]}"}
    if len(steps) > 1:
        fields["steps_of"] = "steps " + ", ".join(map(str, steps[-4:]))
        gaps = {late - early for early, late in itertools.pairwise(steps)}
        if len(steps) > 2 and max(gaps) - min(gaps) <= 1:
            fields["recurrence"] = f"it recurs every {max(gaps)} steps: look for one damaged batch in each epoch"
    return fields


def listing(names: tuple[str, ...], order: tuple[str, ...]) -> str:
    """Layer names as a person would list them: a run of neighbours by its ends.

    Examples:
        >>> listing(("c", "b", "a"), ("a", "b", "c", "d"))
        "'a' to 'c'"
        >>> listing(("a", "d"), ("a", "b", "c", "d"))
        "'a', 'd'"
    """
    places = {name: i for i, name in enumerate(order)}
    known = sorted((name for name in names if name in places), key=places.__getitem__)
    if len(known) == len(order) > 3:
        return "all layers"
    if len(known) > 2 and places[known[-1]] - places[known[0]] == len(known) - 1:
        return f"{known[0]!r} to {known[-1]!r}"
    shown = ", ".join(repr(name) for name in known[:4])
    return shown + (f" and {len(known) - 4} more" if len(known) > 4 else "")
