"""From the signals of a run to the symptoms that the diagnosis looks at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import numpy as np

from gradwatch.detectors.signals import Signals
from gradwatch.diagnosis import Symptoms
from gradwatch.records import Finding


def symptoms(finding: Finding, now: Signals, latest: Mapping[str, Finding]) -> Symptoms:
    """The evidence for a diagnosis.

    Args:
        finding: What was found.
        now: The state of the run.
        latest: The run's latest finding of each rule.
    """
    course, pace, opening = now.course, now.pace, now.opening
    others = {rule: f for rule, f in latest.items() if f.id != finding.id and f.severity != "info"}
    return Symptoms(
        finding,
        now.context.parameters,
        others=others,
        rate=pace.rate,
        rate_growth=pace.growth,
        rate_jump=max(pace.rates) / statistics.median(pace.rates) if pace.rates else 1.0,
        rate_base=pace.base,
        rate_base_step=pace.base_step,
        earlier_rate=pace.rates[-1] if pace.rates else math.nan,
        stable_rate=now.stable_rate,
        update_ratio=pace.total,
        update_spread=pace.spread,
        first_norm=_exp(opening.total),
        first_matrix_norm=opening.matrices,
        usual_norm=_exp(now.total_level),
        norm_rise=now.total_rise,
        steady_share=now.steady / now.index if now.index else 0.0,
        norm_quantile=now.sizes.quantile(0.95),
        below_one=now.sizes.below(1.0),
        first_drop=opening.drop,
        first_fit=opening.fit,
        first_input_ratio=opening.input_ratio,
        first_loss=course.start,
        least_loss=min(course.best, course.last) / course.start if course.start > 0 else math.nan,
        odd_layer=now.scales.odd,
        odd_factor=now.scales.factor,
        usual_scale=now.scales.usual,
        replaced=tuple(now.context.parameters[i].name for i in np.flatnonzero(pace.replaced)),
        replaced_at=(pace.replaced_at[0], pace.replaced_at[1]),
        zero_weights=tuple(now.context.parameters[i].layer for i in np.flatnonzero(pace.first_zero)),
        saturated=_modules(latest, "saturation"),
        dead=_modules(others, "dying_relu"),
        step=now.step,
    )


def _modules(latest: Mapping[str, Finding], rule: str) -> tuple[str, ...]:
    return tuple(latest[rule].evidence.get("modules", ())) if rule in latest else ()


def _exp(log: float) -> float:
    return math.exp(min(log, 700.0)) if not math.isnan(log) else math.nan
