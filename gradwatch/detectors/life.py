"""The life of a finding: it opens once, grows, and resolves; one finding a rule at a time, all its layers together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradwatch.detectors.memory import FloatArray, IntArray, Kept, Mask, PerLayer, Remembers
from gradwatch.records import SEVERITIES, Finding, Severity


@dataclass(frozen=True, slots=True)
class Sign:
    """What a rule saw at one step.

    Args:
        severity: How grave it is now.
        badness: How bad, larger is worse; on a logarithmic scale or a share, so that differences mean something.
        value: The rule's own measure of it.
        threshold: What `value` was held against.
        layers: bool array of shape (l,): where; None for the whole run.
        scores: float array of shape (l,): which of these layers are worst (the largest first).
        since: The step from which the condition held; None means now.
        facts: Evidence, evaluated only when it is needed.
    """

    severity: Severity
    badness: float
    value: float
    threshold: float
    layers: Mask | None = None
    scores: FloatArray | None = None
    since: int | None = None
    facts: Callable[[], dict[str, Any]] = field(default=dict)


class Life(Remembers):
    """Follows the one finding of a rule that may be open.

    Args:
        rule: The rule's id.
        calm: A finding resolves after this many steps without a sign (hysteresis).
        jump: A rise of badness that is told at once; else changes are told each time the finding's age has doubled.
    """

    open = Kept(False)
    first = Kept(0)
    last = Kept(0)
    quiet = Kept(0)
    ended = Kept(-1)
    severity = Kept(0)
    badness = Kept(-math.inf)
    value = Kept(math.nan)
    threshold = Kept(math.nan)
    evidence = Kept[dict[str, Any]]({})
    told_badness = Kept(-math.inf)
    told_step = Kept(0)
    involved = PerLayer(False)
    scores = PerLayer(-math.inf)

    def __init__(self, rule: str, *, calm: int = 20, jump: float = math.log(10)) -> None:
        self.rule, self.calm, self.jump = rule, calm, jump

    def note(self, step: int, sign: Sign) -> Finding | None:
        """Take a sign seen at `step`; a finding when it opened or changed enough to be told."""
        severity = SEVERITIES.index(sign.severity)
        if not self.open:
            self._open(step, sign)
        worse, graver = sign.badness > self.badness, severity > self.severity
        self.last, self.quiet = step, 0
        if worse:
            self.badness, self.value, self.threshold = sign.badness, sign.value, sign.threshold
        self.severity = max(self.severity, severity)
        if sign.layers is not None:
            self.involved |= sign.layers
            if sign.scores is not None:
                np.maximum(self.scores, sign.scores, out=self.scores, where=sign.layers)
        age = self.last - self.first
        due = step - self.told_step >= max(10, age // 2) or sign.badness >= self.told_badness + self.jump
        if graver or due:
            self.evidence = {**self.evidence, **sign.facts()}
            self.told_badness, self.told_step = self.badness, step
            return self.finding()
        return None

    def rest(self, step: int) -> Finding | None:
        """No sign at `step`; the finding when this resolves it."""
        if not self.open:
            return None
        self.quiet += 1
        if self.quiet < self.calm:
            return None
        self.open, self.ended = False, step
        return self.finding(resolved=step - self.quiet + 1)

    def finding(self, resolved: int | None = None) -> Finding:
        """The finding as it stands, without words."""
        places: IntArray = np.flatnonzero(self.involved)
        places = places[np.argsort(-self.scores[places], kind="stable")]
        names = self.context.layers.names
        return Finding(
            id=f"{self.rule}-{self.first}",
            rule=self.rule,
            severity=SEVERITIES[self.severity],
            first_step=self.first,
            last_step=self.last,
            layers=tuple(names[i] for i in places),
            value=self.value,
            threshold=self.threshold,
            evidence=self.evidence,
            resolved_step=resolved,
        )

    def _open(self, step: int, sign: Sign) -> None:
        since = step if sign.since is None else sign.since
        self.open, self.first = True, max(since, self.ended + 1)
        self.severity, self.badness, self.evidence = -1, -math.inf, {}
        self.told_badness, self.told_step = math.inf, step
        self.involved[:] = False
        self.scores[:] = -math.inf

    def recall(self, state: Mapping[str, Any]) -> None:
        """Go on from what `remembered` gave."""
        super().recall(state)
        self.evidence = dict(self.evidence)
