"""Learning-rate decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from gradwatch.actions.base import BetweenStepsAction, Due, RunState, require_count, require_positive, sound_factor
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import Finding

#: Ways back to the full learning rate: from the factor at its start and the share of the way, to the factor.
SHAPES = {
    "exponential": lambda start, share: start ** (1.0 - share),
    "cosine": lambda start, share: start + (1.0 - start) * (1.0 - math.cos(math.pi * share)) / 2.0,
}
#: The way back ends when the loss has risen by this share of what it had fallen.
LOST = 0.1


class DecayLR(BetweenStepsAction):
    """Scale the learning rate down when a finding calls for it, and perhaps slowly up again when all is well.

    The factor is gradwatch's own, around the optimizer's step: the scheduler never sees it, and `close()` undoes it.

    Args:
        factor: Multiply gradwatch's factor by this each time; between 0 and 1. A smaller one takes its place
            where updates are so large that only that brings them down to 1 % of the weights.
        min_factor: The factor never falls below this.
        recover: Steps of the way back to the full rate; None stays down.
        hold: Steps without any finding before the way back begins. A relapse ends it, and so does a loss that rises by
            a tenth of what it had fallen: then the rate stays down.
        shape: `exponential` or `cosine`, of the way back.
        on: Rules that call for it.
        cooldown: Steps between two decays.
        max_times: Decays in a run at most.
        min_severity: Findings below this severity do not call for it.
        within: Steps within which the finding must be gone, else this decay did not help.
        tries: Decays in a row without help before it is given up: each is a smaller rate, and so not the same again.

    Examples:
        >>> DecayLR(factor=0.5, on="exploding").config()["factor"]
        0.5
    """

    default_on: ClassVar[tuple[str, ...]] = ("exploding", "divergence", "spike", "oscillation", "update_ratio")
    priority: ClassVar[int] = 20
    only_rate: ClassVar[bool] = True

    def __init__(
        self,
        factor: float = 0.5,
        *,
        min_factor: float = 1e-3,
        recover: int | None = None,
        hold: int = 100,
        shape: str = "exponential",
        on: str | Sequence[str] | None = None,
        cooldown: int = 50,
        max_times: int | None = None,
        min_severity: str = "warning",
        within: int = 50,
        tries: int = 5,
    ) -> None:
        super().__init__(
            on=on, cooldown=cooldown, max_times=max_times, min_severity=min_severity, within=within, tries=tries
        )
        if require_positive("factor", factor) >= 1.0:
            raise ConfigurationError.of("factor", "< 1", factor)
        if require_positive("min_factor", min_factor) > factor:
            raise ConfigurationError.of("min_factor", f"<= factor ({factor})", min_factor)
        if shape not in SHAPES:
            raise UnknownNameError.among("shape", shape, SHAPES)
        self.factor, self.min_factor = factor, min_factor
        self.way_back = None if recover is None else require_count("recover", recover)
        self.hold, self.shape = require_count("hold", hold), shape

    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.respond`."""
        after = max(state.lr_factor * sound_factor(finding, self.factor), self.min_factor)
        if after >= state.lr_factor:
            return None
        detail = f"learning rate scaled by {after:.4g} (was {state.lr_factor:.4g}) because of {finding.rule}"
        return Due(self, detail, finding=finding, before=state.lr_factor, after=after, lr_factor=after)

    def recover(self, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.recover`."""
        if self.way_back is None or state.lr_factor >= 1.0 or state.well_since is None:
            return None
        before = state.lr_factor
        if state.recovery is None:
            if state.recovered or step - state.well_since < self.hold:
                return None
            state.recovery, state.recovered, state.loss_held = (step, before), True, state.loss
            detail = f"learning rate on its way back from {before:.4g}, to be whole again in {self.way_back} steps"
            return Due(self, detail, before=before, after=before, lr_factor=before)
        begun, start = state.recovery
        if state.loss - state.loss_held > LOST * abs(state.first_loss - state.loss_held):
            state.recovery = None
            return Due(self, "way back given up: the loss rises again", before=before, after=start, lr_factor=start)
        share = min(1.0, (step - begun) / self.way_back)
        state.lr_factor = SHAPES[self.shape](start, share)
        if share < 1.0:
            return None
        return Due(self, "learning rate whole again", before=before, after=1.0, lr_factor=1.0)

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        common = super().config()
        del common["confirm"]
        return {
            **common,
            "factor": self.factor,
            "min_factor": self.min_factor,
            "recover": self.way_back,
            "hold": self.hold,
            "shape": self.shape,
        }
