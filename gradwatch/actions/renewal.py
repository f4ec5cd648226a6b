"""Remedies for weights: initialise again, forget the momentum, change the architecture; and the last one, to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from gradwatch.actions.base import OF_THE_RATE, BetweenStepsAction, Due, RemedyOptions, RunState, require_positive
from gradwatch.actions.course import is_well_below
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import Finding

#: How `Reinitialize` may fill weights; `gradwatch.remedies.initialize` knows the same.
SCHEMES = ("auto", "data", "kaiming", "xavier", "orthogonal", "lsuv", "default")
#: Changes of the architecture, and the causes (ids of `gradwatch.diagnosis`) that each takes away for sure.
CHANGES = {"output": ("output_layer",), "activation": ("activation",), "norm": ()}
#: Causes that no new weights take away.
_NOT_OF_THE_WEIGHTS = ("half_overflow", "half_underflow", "gradients_not_cleared", "unused_layers", "weight_decay")
#: Rules that call for new weights only where these take the cause away.
_BY_CAUSE = ("stall", "imbalance", "plateau")
#: The learning-rate factor never falls below this.
_MIN_FACTOR = 1e-4


class _WhenNothingIsLearnt(BetweenStepsAction):
    """Base of remedies that cost what was learnt: not while the loss falls, nor on a mere warning of unknown loss."""

    renews: ClassVar[bool] = True
    begins_anew: ClassVar[bool] = True

    def __init__(self, **common: Unpack[RemedyOptions]) -> None:
        given: RemedyOptions = {"max_times": 2, "within": 100, "confirm": 30, **common}
        super().__init__(**given)

    def is_called_for(self, finding: Finding, state: RunState) -> bool:
        """Whether nothing would be lost, and something might be won."""
        if finding.evidence.get("cause_id", "") in _NOT_OF_THE_WEIGHTS:
            return False
        if math.isnan(state.loss):
            return finding.severity == "critical"
        if finding.evidence.get("skipped") and is_well_below(state.best_loss, state.first_loss, share=0.8):
            return False  # the weights are as good as they were: those steps were not taken
        return not state.learns


class Reinitialize(_WhenNothingIsLearnt):
    """Give the layers at fault new weights, and clear their optimizer state.

    The scheme follows from the layer and the activation behind it: Kaiming for the ReLU family, Xavier for tanh and
    sigmoid, orthogonal for recurrent weights, zero biases. `auto` then lets the next batch through and scales and
    shifts each layer until its outputs have mean 0 and variance 1 on it (Mishkin and Matas 2016, LSUV; Salimans and
    Kingma 2016, Weight Normalization, section 3), which works whatever the activation is.

    A network is as sick as the path of its signal, so where gradients vanish or explode across depth, all hidden layers
    are at fault.

    The learning rate is whole again for new weights, unless it was the cause, or they fell sick before: then it is
    lower.

    Args:
        factor: Multiply the learning-rate factor by this then; 1 leaves it.
        scheme: `auto`; `data` (only with a batch); `kaiming`, `xavier`, `orthogonal`, `lsuv`; or `default`, the
            module's own `reset_parameters`.
        common: `on`, `cooldown`, `max_times`, `min_severity`, `within`, `tries`, `confirm`, as of every remedy.

    Examples:
        >>> Reinitialize(scheme="kaiming", on="vanishing").on
        ('vanishing',)
    """

    default_on: ClassVar[tuple[str, ...]] = ("vanishing", "exploding", "nonfinite", "dead", "dying_relu", "saturation")
    priority: ClassVar[int] = 40
    cures = ("init_large", "init_small", "layer_scale", "recurrence", "dying_relu", "weights_replaced")
    is_undone: ClassVar[bool] = True

    def __init__(self, *, scheme: str = "auto", factor: float = 0.1, **common: Unpack[RemedyOptions]) -> None:
        given: RemedyOptions = {"max_times": 3, "tries": 2, **common}
        super().__init__(**given)
        if require_positive("factor", factor) > 1.0:
            raise ConfigurationError.of("factor", "<= 1", factor)
        self.factor = factor
        if scheme not in SCHEMES:
            raise UnknownNameError.among("scheme", scheme, SCHEMES)
        self.scheme = scheme

    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.respond`."""
        cause = finding.evidence.get("cause_id", "")
        if not self.is_called_for(finding, state) or (finding.rule in _BY_CAUSE and cause not in self.cures):
            return None
        is_whole = cause not in OF_THE_RATE and self.name not in state.times
        after = 1.0 if is_whole else min(state.lr_factor, max(state.lr_factor * self.factor, _MIN_FACTOR))
        # A dead or saturated layer is its own fault; a signal that shrinks or grows is everyone's on its way.
        layers = finding.layers if finding.rule in ("dead", "dying_relu", "saturation") else ()
        where = f"layers {', '.join(layers[:3])}" if layers else "all layers"
        detail = f"{where} initialised again ({self.scheme}) because of {finding.rule}"
        return Due(self, detail, layers=layers, finding=finding, before=state.lr_factor, after=after, lr_factor=after)

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {"scheme": self.scheme, "factor": self.factor, **super().config()}


class ResetOptimizerState(BetweenStepsAction):
    """Forget momentum and second moments of all parameters, or of the layers that the finding names.

    Args:
        whole: Reset all parameters; False only those of the finding's layers.
        common: `on`, `cooldown`, `max_times`, `min_severity`, `within`, `tries`, `confirm`, as of every remedy.

    Examples:
        >>> ResetOptimizerState(on="spike", max_times=3).max_times
        3
    """

    default_on: ClassVar[tuple[str, ...]] = ("exploding", "divergence", "oscillation")
    priority: ClassVar[int] = 30

    def __init__(self, *, whole: bool = True, **common: Unpack[RemedyOptions]) -> None:
        super().__init__(**common)
        self.whole = whole

    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.respond`."""
        layers = () if self.whole else finding.layers
        where = f"layers {', '.join(layers[:3])}" if layers else "all layers"
        return Due(
            self, f"optimizer state of {where} cleared because of {finding.rule}", layers=layers, finding=finding
        )

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {"whole": self.whole, **super().config()}


class Restructure(_WhenNothingIsLearnt):
    """Change the architecture in place: the last remedy before giving up, and never without being asked for.

    Each application makes the first of the `changes` that changes anything, keeps all weights that have a place in the
    new network, initialises the touched layers anew, and lets new parameters join the optimizer. `output`: a softmax
    over a single unit, whose gradient is zero by construction, becomes a sigmoid, and a ReLU behind the last layer a
    softplus. `activation`: hidden activations that saturate or grow exponentially become `replacement`. `norm`: a
    normalisation goes in front of each hidden activation.

    Args:
        changes: Which, in order.
        replacement: Name of a class of `torch.nn` for `activation`.
        common: `on`, `cooldown`, `max_times`, `min_severity`, `within`, `tries`, `confirm`, as of every remedy.

    Examples:
        >>> Restructure(changes=("norm",)).changes
        ('norm',)
    """

    default_on: ClassVar[tuple[str, ...]] = ("vanishing", "exploding", "nonfinite", "dead", "dying_relu", "saturation")
    priority: ClassVar[int] = 60

    def __init__(
        self, *, changes: Sequence[str] = tuple(CHANGES), replacement: str = "ReLU", **common: Unpack[RemedyOptions]
    ) -> None:
        given: RemedyOptions = {"max_times": 3, "tries": 3, **common}
        super().__init__(**given)
        for change in changes:
            if change not in CHANGES:
                raise UnknownNameError.among("change", change, CHANGES)
        self.changes, self.replacement = tuple(changes), replacement
        self.cures = tuple(cause for change in changes for cause in CHANGES[change])

    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.respond`."""
        if not self.is_called_for(finding, state):
            return None
        detail = f"architecture changed because of {finding.rule}"
        return Due(self, detail, finding=finding, before=state.lr_factor, after=1.0, lr_factor=1.0)

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {"changes": list(self.changes), "replacement": self.replacement, **super().config()}


class Stop(BetweenStepsAction):
    """Leave the training loop: raises `gradwatch.StopTraining` at the step boundary, or stops in the framework's way.

    Args:
        common: `on`, `cooldown`, `min_severity`, `confirm`, as of every remedy.

    Examples:
        >>> Stop(on="divergence").min_severity
        'critical'
    """

    default_on: ClassVar[tuple[str, ...]] = ("nonfinite", "divergence", "exploding", "dead")
    priority: ClassVar[int] = 90

    def __init__(self, **common: Unpack[RemedyOptions]) -> None:
        given: RemedyOptions = {"min_severity": "critical", "max_times": 1, **common}
        super().__init__(**given)

    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """See `BetweenStepsAction.respond`."""
        return Due(self, f"training stopped: {finding.message or finding.rule}", finding=finding)
