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
    change = f"twice as large every {times:.0f} steps" if verb == "grow" else f"halved every {times:.0f} steps"
    size = f"{factor:.3g} times" if factor >= 1 else f"to 1/{1 / factor:.3g}"
    against = " against the other layers" if facts.get("relative") else ""
    overflow = facts.get("overflow_steps")
    ahead = f"; at this rate they overflow in {overflow:,.0f} steps" if overflow is not None else ""
    return (
        f"Gradients{place} {verb} {abs(finding.value):.1%} a step{against} since step {finding.first_step} "
        f"({size} in {steps} steps): {change}{ahead}."
    )


def layers(count: int) -> str:
    """A number of layers in words."""
    return "1 layer was" if count == 1 else f"{count} layers were"
