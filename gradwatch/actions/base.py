"""What every remedy is. Actions decide; the backend of the framework applies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import RULES, Finding

#: Arrays of whatever library does the step: numpy, torch, jax or keras.ops tensors.
Array = Any


class Namespace(Protocol):
    """The few array functions that an in-step action may use; numpy has them all under these names."""

    def minimum(self, a: Array, b: Array) -> Array: ...
    def maximum(self, a: Array, b: Array) -> Array: ...
    def where(self, condition: Array, a: Array, b: Array) -> Array: ...
    def sqrt(self, a: Array) -> Array: ...
    def sum(self, a: Array) -> Array: ...
    def isfinite(self, a: Array) -> Array: ...


@dataclass(frozen=True)
class InStepDecision:
    """What an in-step action wants done to the gradients of this step.

    Args:
        scale: Factor for all gradients (a scalar) or for each parameter (shape (p,)); None leaves them alone.
        skip: Boolean scalar: leave parameters and optimizer state as if the batch had not been there.
        state: What the action wants to remember for the next step.
    """

    scale: Array | None = None
    skip: Array | None = None
    state: tuple[Array, ...] = ()


class Action(ABC):
    """A remedy."""

    @property
    def name(self) -> str:
        """Class name, as in the record."""
        return type(self).__name__

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build an equal action, as JSON."""

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.config().items())})"


class InStepAction(Action):
    """Computed and applied inside the step, on the device, from norms that are measured anyway.

    `decide` is a pure function of norms and state, written in the few functions of `Namespace`, so that the same formula
    runs in numpy, in torch on a GPU and inside a compiled Keras step.
    """

    #: The backend clips each gradient element to [-clip_value, clip_value] when this is set.
    clip_value: float | None = None

    def initial_state(self) -> tuple[float, ...]:
        """The state before the first step."""
        return ()

    @abstractmethod
    def decide(self, norms: Array, state: tuple[Array, ...], xp: Namespace) -> InStepDecision:
        """What to do in this step.

        Args:
            norms: L2 norms of the gradients that this optimizer is about to use, shape (p,); 0 without a gradient.
            state: What the last decision returned.
            xp: The array functions.
        """


@dataclass(frozen=True)
class Due:
    """A between-step action that is to be applied at the next step boundary.

    Args:
        action: The action.
        detail: What is going to be done, in one sentence.
        layers: Where; empty for the whole model.
        finding: The finding that called for it; None when none did (a recovery).
        before: The number that changes, before; NaN where there is none.
        after: The same, after.
    """

    action: BetweenStepsAction
    detail: str
    layers: tuple[str, ...] = ()
    finding: Finding | None = None
    before: float = math.nan
    after: float = math.nan


class BetweenStepsAction(Action):
    """Decided from findings, applied between two steps.

    Args:
        on: Rules whose findings call for it; a single name or several.
        cooldown: Steps that must pass before it is applied again.
        max_times: How often it is applied at most in a run; None for no limit.
        min_severity: Findings below this severity do not call for it.
    """

    default_on: ClassVar[tuple[str, ...]] = ()
    #: Order at one boundary: the lowest wins, and only one between-step action is applied at a boundary.
    priority: ClassVar[int] = 50

    def __init__(
        self,
        *,
        on: str | Sequence[str] | None = None,
        cooldown: int = 50,
        max_times: int | None = None,
        min_severity: str = "warning",
    ) -> None:
        self.on = self.default_on if on is None else (on,) if isinstance(on, str) else tuple(on)
        for rule in self.on:
            if rule not in RULES:
                raise UnknownNameError.among("rule", rule, RULES)
        if cooldown < 0:
            raise ConfigurationError.of("cooldown", ">= 0", cooldown)
        if max_times is not None and max_times < 1:
            raise ConfigurationError.of("max_times", ">= 1", max_times)
        if min_severity not in ("info", "warning", "critical"):
            raise UnknownNameError.among("severity", min_severity, ("info", "warning", "critical"))
        self.cooldown, self.max_times, self.min_severity = cooldown, max_times, min_severity

    @abstractmethod
    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """What to do about a finding that calls for it; None when nothing can be done (any more)."""

    def recover(self, step: int, state: RunState) -> Due | None:
        """What to undo when all is well again; called each time the policy looks and nothing is due."""
        return None

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {"on": list(self.on), "cooldown": self.cooldown, "max_times": self.max_times}


@dataclass
class RunState:
    """What actions may know of the run: numbers that earlier actions changed.

    Args:
        lr_factor: gradwatch's own factor on the learning rate.
        last_applied: Action name to the step at which it was last applied.
        times: Action name to how often it was applied.
    """

    lr_factor: float = 1.0
    last_applied: dict[str, int] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)


def require_positive(name: str, value: float) -> float:
    """`value` as a float, if it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or not math.isfinite(value):
        raise ConfigurationError.of(name, "a finite number > 0", value)
    return float(value)
