"""Proof: did a remedy help?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from gradwatch.actions.base import RunState
from gradwatch.records import SEVERITIES, ActionRecord, Finding

HELPED, NO_EFFECT, WORSE = "helped", "no effect", "worse"
#: A finding that comes back after the weights were changed is held against the remedy once it has stood this long.
PERSISTS = 20
#: A loss above this many times the one at the remedy, and the first, means that things got worse.
WORSE_LOSS = 3.0


@dataclass(frozen=True)
class Trial:
    """A remedy that was applied, and what it will be judged by.

    Args:
        key: The action's name, with a number where a list holds several of a class.
        record: The record of its application.
        deadline: The step at which judgement falls.
        severity: Of the finding, when the remedy was applied.
        loss: Median loss then; NaN when not known.
        renews: Whether the detectors started anew: then a finding that is gone at once proves nothing.
    """

    key: str
    record: ActionRecord
    deadline: int
    severity: str
    loss: float
    renews: bool

    def verdict(self, step: int, findings: Iterable[Finding], state: RunState) -> str:
        """`helped`, `no effect` or `worse`; empty while it is too early to say.

        Args:
            step: The next step.
            findings: Those that are open.
            state: Of the run.
        """
        since = self.record.step if self.renews else 0
        standing = list(findings)
        same = [finding for finding in standing if finding.rule == self.record.reason and finding.first_step >= since]
        if self._is_worse(same, state) or any(self._is_new_trouble(finding) for finding in standing):
            return WORSE
        if step >= self.deadline:
            return NO_EFFECT if same else HELPED
        if self.renews:
            is_back = any(f.severity == "critical" or step - f.first_step >= PERSISTS for f in same)
            return NO_EFFECT if is_back else ""
        return "" if same else HELPED

    def _is_new_trouble(self, finding: Finding) -> bool:
        """Another rule, and worse than what the remedy was for."""
        is_other = finding.rule != self.record.reason and finding.first_step >= self.record.step
        return is_other and finding.severity == "critical"

    def _is_worse(self, same: list[Finding], state: RunState) -> bool:
        if math.isnan(state.loss) or math.isnan(self.loss):
            graver = (SEVERITIES.index(finding.severity) > SEVERITIES.index(self.severity) for finding in same)
            return any(graver)
        # Whoever goes back to the start begins at its loss again.
        start = abs(state.start_loss) if self.renews and not math.isnan(state.start_loss) else 0.0
        reference = max(abs(self.loss), abs(state.first_loss), start)
        return math.isfinite(self.loss) and not state.loss <= WORSE_LOSS * reference

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return {**dataclasses.asdict(self), "record": self.record.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**data, "record": ActionRecord.from_json(data["record"])})
