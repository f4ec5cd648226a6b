"""Back to the last good weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from gradwatch.actions.base import (
    OF_THE_RATE,
    BetweenStepsAction,
    Due,
    RunState,
    require_count,
    require_positive,
    sound_factor,
)
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import Finding

PLACES = ("memory", "disk")
#: Steps that are skipped are borne with this many times as long.
SKIPPED = 3
#: Rules that call for it only where steps that were too large did the harm: the weights before them are good.
_BY_CAUSE = ("dead", "dying_relu", "vanishing")
#: A schedule has raised the rate when it is this many times what it was at the snapshot.
RISEN = 2.0
#: What the rate is multiplied by then, at most: a loss that leaps tells how far it is off, units that die do not.
_KILLED = 0.1


class Rollback(BetweenStepsAction):
    """Restore the last good snapshot of parameters, buffers and optimizer state, lower the learning rate, and go on.

    Snapshots are taken every `every` steps while no finding that calls for this action is open; the one restored is the
    newest that is older than the finding. The data goes on where it was, so the batches that led astray are not seen
    again (as in Chowdhery et al. 2022, PaLM, section 5.1); the scheduler is not rewound.

    Args:
        every: Steps between snapshots.
        keep: Snapshots kept.
        where: `memory` (host memory) or `disk` (in the run directory, deleted at the end).
        factor: Multiply the learning-rate factor by this each time, or by less where the loss shot up: gradient descent
            on a quadratic of curvature c multiplies the error by |1 - rate c|, so a loss that grew r-fold in a step
            asks for a rate that is 1 + sqrt(r) times smaller; a tenth at most where units died of it. 1 leaves it.
            Where the schedule has raised the rate since the snapshot, it begins from what it was there.
        min_factor: The factor never falls below this.
        on: Rules that call for it.
        cooldown: Steps between two rollbacks.
        max_times: Rollbacks in a run at most.
        min_severity: Findings below this severity do not call for it.
        patience: Steps that a warning must have stood; a critical finding is answered at once.
        within: Steps within which the finding must stay away, else it did not help.
        tries: Rollbacks in a row without help before it is given up; each goes one snapshot further back.

    Examples:
        >>> Rollback(every=200, where="disk").where
        'disk'
    """

    default_on: ClassVar[tuple[str, ...]] = ("nonfinite", "divergence", "exploding", *_BY_CAUSE)
    priority: ClassVar[int] = 10
    renews: ClassVar[bool] = True

    def __init__(
        self,
        *,
        every: int = 100,
        keep: int = 3,
        where: str = "memory",
        factor: float = 0.5,
        min_factor: float = 1e-6,
        on: str | Sequence[str] | None = None,
        cooldown: int = 20,
        max_times: int | None = 10,
        min_severity: str = "warning",
        patience: int = 20,
        within: int = 60,
        tries: int = 3,
    ) -> None:
        super().__init__(
            on=on, cooldown=cooldown, max_times=max_times, min_severity=min_severity, within=within, tries=tries
        )
        if where not in PLACES:
            raise UnknownNameError.among("where", where, PLACES)
        if require_positive("factor", factor) > 1.0:
            raise ConfigurationError.of("factor", "<= 1", factor)
        if require_positive("min_factor", min_factor) > 1.0:
            raise ConfigurationError.of("min_factor", "<= 1", min_factor)
        self.every, self.keep = require_count("every", every), require_count("keep", keep)
        self.patience = require_count("patience", patience, least=0)
        self.where, self.factor, self.min_factor = where, factor, min_factor

    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.respond`."""
        if finding.rule == "nonfinite" and finding.first_step <= state.began:
            return None  # there is no good state: these weights never gave a finite step
        if finding.rule in _BY_CAUSE and not _is_killed(finding, state):
            return None
        if finding.evidence.get("skipped") == "grad_scaler":
            return None
        # Where no update was taken, the weights are as good as before; yet they may be such as to make more of them.
        patience = SKIPPED * self.patience if finding.evidence.get("skipped") else self.patience
        if finding.severity != "critical" and step - finding.first_step < patience:
            return None
        factor = min(self.factor, 1.0 / (1.0 + math.sqrt(state.growth))) if self.factor < 1.0 else 1.0
        factor = sound_factor(finding, factor) if factor < 1.0 else factor
        factor = min(factor, _KILLED) if finding.rule in _BY_CAUSE and factor < 1.0 else factor
        backs = state.failed(self.name, finding.rule)
        lowered = min(state.lr_factor * factor, self._of_then(finding.first_step, backs, state) * factor)
        after = min(state.lr_factor, max(lowered, self.min_factor))
        return Due(
            self,
            f"back to the last good snapshot because of {finding.rule}, learning rate scaled by {after:.4g}",
            finding=finding,
            before=state.lr_factor,
            after=after,
            lr_factor=after,
            until_step=finding.first_step,
            backs=backs,
        )

    def _of_then(self, until_step: int, backs: int, state: RunState) -> float:
        """The factor at which the present rate is that of the snapshot, where the schedule has raised it since."""
        snapshot = until_step // self.every * self.every - backs * self.every
        then = next((rate for step, rate in reversed(state.rates) if step <= snapshot), math.nan)
        return then / state.rate if RISEN * then < state.rate * state.lr_factor else state.lr_factor

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        common = super().config()
        del common["confirm"]
        return {
            **common,
            "every": self.every,
            "keep": self.keep,
            "where": self.where,
            "factor": self.factor,
            "min_factor": self.min_factor,
            "patience": self.patience,
        }


def _is_killed(finding: Finding, state: RunState) -> bool:
    """Whether the weights once passed a gradient on, and steps that were too large ended that."""
    return finding.evidence.get("cause_id", "") in OF_THE_RATE and finding.first_step > state.began
