"""Phrases that several rules use in their messages."""

from __future__ import annotations

import math

from gradwatch.records import Finding


def exp(log: float) -> float:
    """E to the power of `log`, without overflow."""
    return math.exp(min(log, 700.0))


def where(finding: Finding) -> str:
    """The layers of a finding, as a phrase that begins with a space; empty without layers."""
    layers = finding.layers
    if not layers:
        return ""
    if len(layers) <= 3:
        return f" in {', '.join(repr(name) for name in layers)}"
    return f" in {len(layers)} layers, most in {layers[0]!r}"


def drift(verb: str, place: str, finding: Finding) -> str:
    """The sentence about a sustained trend."""
    facts = finding.evidence
    factor, steps = facts.get("factor", math.nan), facts.get("over_steps", 0)
    times = facts.get("doubling_steps") or facts.get("halving_steps") or math.nan
    change = "twice as large" if verb == "grow" else "halved"
    size = f"{factor:.3g} times" if factor >= 1 else f"to 1/{1 / factor:.3g}"
    return (
        f"Gradients{place} {verb} {abs(finding.value):.1%} a step against the other layers "
        f"since step {finding.first_step} ({size} in {steps} steps): {change} every {times:.0f} steps."
    )
