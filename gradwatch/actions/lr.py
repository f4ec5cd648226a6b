"""Learning-rate decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from gradwatch.actions.base import BetweenStepsAction, Due, RunState, require_positive
from gradwatch.errors import ConfigurationError
from gradwatch.records import Finding


class DecayLR(BetweenStepsAction):
    """Scale the learning rate down when a finding calls for it.

    The factor is gradwatch's own, around the optimizer's step: the scheduler never sees it, and `close()` undoes it.

    Args:
        factor: Multiply gradwatch's factor by this each time; between 0 and 1.
        min_factor: The factor never falls below this.
        on: Rules that call for it.
        cooldown: Steps between two decays.
        max_times: Decays in a run at most.

    Examples:
        >>> DecayLR(factor=0.5, on="exploding")
        DecayLR(on=['exploding'], cooldown=50, max_times=None, factor=0.5, min_factor=0.001)
    """

    default_on: ClassVar[tuple[str, ...]] = ("exploding", "divergence", "spike", "oscillation", "update_ratio")
    priority: ClassVar[int] = 20

    def __init__(
        self,
        factor: float = 0.5,
        *,
        min_factor: float = 1e-3,
        on: str | Sequence[str] | None = None,
        cooldown: int = 50,
        max_times: int | None = None,
    ) -> None:
        super().__init__(on=on, cooldown=cooldown, max_times=max_times)
        if require_positive("factor", factor) >= 1.0:
            raise ConfigurationError.of("factor", "< 1", factor)
        if require_positive("min_factor", min_factor) > factor:
            raise ConfigurationError.of("min_factor", f"<= factor ({factor})", min_factor)
        self.factor, self.min_factor = factor, min_factor

    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.respond`."""
        after = max(state.lr_factor * self.factor, self.min_factor)
        if after >= state.lr_factor:
            return None
        detail = f"learning rate scaled by {after:.4g} (was {state.lr_factor:.4g}) because of {finding.rule}"
        return Due(self, detail, finding=finding, before=state.lr_factor, after=after)

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {**super().config(), "factor": self.factor, "min_factor": self.min_factor}
