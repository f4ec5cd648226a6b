"""A higher learning rate, for a run that stands still."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from gradwatch.actions.base import BetweenStepsAction, Due, RemedyOptions, RunState, require_positive
from gradwatch.errors import ConfigurationError
from gradwatch.records import Finding

#: Causes of a stall that a higher rate takes away.
_OF_THE_RATE = ("learning_rate_small", "half_underflow")


class RaiseLR(BetweenStepsAction):
    """Scale the learning rate up where updates are lost against the size of the weights and nothing was learnt.

    The factor is gradwatch's own, as that of `DecayLR`, and makes an update change the weights by `target` of their
    norm: about 1e-3 is usual (Karpathy, CS231n, section "Ratio of weights:updates"). It is taken back where the loss
    ends up worse.

    Args:
        target: Share of the weights' norm that an update is to change; between 0 and 0.01.
        max_factor: The factor never rises above this.
        common: `on`, `cooldown`, `max_times`, `min_severity`, `within`, `tries`, `confirm`, as of every remedy.

    Examples:
        >>> RaiseLR(max_factor=100.0).on
        ('stall',)
    """

    default_on: ClassVar[tuple[str, ...]] = ("stall",)
    priority: ClassVar[int] = 25
    cures = _OF_THE_RATE
    only_rate: ClassVar[bool] = True
    is_undone: ClassVar[bool] = True

    def __init__(self, *, target: float = 1e-3, max_factor: float = 1e6, **common: Unpack[RemedyOptions]) -> None:
        given: RemedyOptions = {"max_times": 2, "within": 100, "confirm": 40, **common}
        super().__init__(**given)
        if require_positive("target", target) > 0.01:
            raise ConfigurationError.of("target", "<= 0.01", target)
        if require_positive("max_factor", max_factor) <= 1.0:
            raise ConfigurationError.of("max_factor", "> 1", max_factor)
        self.target, self.max_factor = target, max_factor

    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.respond`."""
        facts = finding.evidence
        ratio = float(facts.get("ratio") or 0.0)
        is_lost = facts.get("cause_id", "") in _OF_THE_RATE and facts.get("everywhere") and not state.learns
        if not is_lost or not 0.0 < ratio < self.target:
            return None
        after = min(state.lr_factor * self.target / ratio, self.max_factor)
        if after <= state.lr_factor:
            return None
        detail = f"learning rate scaled by {after:.4g} (was {state.lr_factor:.4g}) because of {finding.rule}"
        return Due(self, detail, finding=finding, before=state.lr_factor, after=after, lr_factor=after)

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {**super().config(), "target": self.target, "max_factor": self.max_factor}
