"""What every remedy is. Actions decide; the backend of the framework applies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypedDict

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import RULES, SEVERITIES, Finding, Floats, Parameter

#: A loss above this many times the first one shows that steps have wrecked the weights.
WRECKED = 1.1
#: Share of the weights that an update may change; ten times what is usual.
SOUND_UPDATE = 0.01

#: Causes (ids of `gradwatch.diagnosis`) that bring weights down, and would bring others down, at the same rate.
OF_THE_RATE = ("learning_rate", "killed_units", "data_scale")

#: Arrays of whatever library does the step: numpy, torch, jax or keras.ops tensors.
Array = Any


class Namespace(Protocol):
    """The few array functions that an in-step action may use; numpy, jax.numpy and keras.ops have them all."""

    def minimum(self, a: Array, b: Array) -> Array:
        """Elementwise; one of both may be a number."""
        ...

    def maximum(self, a: Array, b: Array) -> Array:
        """Elementwise; one of both may be a number."""
        ...

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        """`a` where the condition holds, else `b`; one of both may be a number."""
        ...

    def sqrt(self, a: Array) -> Array:
        """Elementwise square root."""
        ...

    def sum(self, a: Array) -> Array:
        """Sum of all elements."""
        ...

    def isfinite(self, a: Array) -> Array:
        """Elementwise: neither NaN nor infinite."""
        ...

    def sort(self, a: Array) -> Array:
        """A vector in ascending order."""
        ...

    def cumsum(self, a: Array) -> Array:
        """Running sums of a vector."""
        ...

    def ones_like(self, a: Array) -> Array:
        """Ones of the same shape."""
        ...

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        """Vectors one behind the other."""
        ...

    def reshape(self, a: Array, shape: tuple[int, ...]) -> Array:
        """The same numbers in another shape."""
        ...


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

    `decide` is a pure function of norms and state, written in the few functions of `Namespace`, so that the same
    formula runs in numpy, in torch on a GPU and inside a compiled Keras step.
    """

    #: The backend clips each gradient element to [-clip_value, clip_value] when this is set.
    clip_value: float | None = None
    #: The backend calls `unit_scale` for every parameter that the action does not spare when this is true.
    by_unit: ClassVar[bool] = False

    def initial_state(self) -> tuple[float | Floats, ...]:
        """The state before the first step: numbers, or arrays of fixed shape."""
        return ()

    @abstractmethod
    def decide(self, norms: Array, state: tuple[Array, ...], xp: Namespace) -> InStepDecision:
        """What to do in this step.

        Args:
            norms: L2 norms of the gradients that this optimizer is about to use, shape (p,); 0 without a gradient.
            state: What the last decision returned.
            xp: The array functions.
        """

    def unit_scale(self, grad_norm: Array, weight_norm: Array, xp: Namespace) -> Array:
        """Factor for each unit of one parameter, from the norms of the unit's gradient and weights (same shapes)."""
        raise NotImplementedError

    def spares(self, parameter: Parameter, *, is_last: bool) -> bool:
        """Whether `unit_scale` is not for this parameter; `is_last` is true in the layer nearest to the output."""
        return False


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
        lr_factor: gradwatch's factor on the learning rate from now on; None leaves it.
        until_step: For a rollback: the last step that may be in the snapshot.
        backs: For a rollback: how many snapshots before that to go back.
        undo: Take back what the action did before.
    """

    action: BetweenStepsAction
    detail: str
    layers: tuple[str, ...] = ()
    finding: Finding | None = None
    before: float = math.nan
    after: float = math.nan
    lr_factor: float | None = None
    until_step: int | None = None
    backs: int = 0
    undo: bool = False


class RemedyOptions(TypedDict, total=False):
    """The arguments of every `BetweenStepsAction`."""

    on: str | Sequence[str] | None
    cooldown: int
    max_times: int | None
    min_severity: str
    within: int
    tries: int
    confirm: int


class BetweenStepsAction(Action):
    """Decided from findings, applied between two steps, and then watched: did it help?

    Args:
        on: Rules whose findings call for it; a single name or several.
        cooldown: Steps that must pass before it is applied again.
        max_times: How often it is applied at most in a run; None for no limit.
        min_severity: Findings below this severity do not call for it.
        within: Steps within which the finding must be gone; else the remedy did not help.
        tries: How often in a row it may fail to help against one rule before it is not tried again for it.
        confirm: Steps that a warning must have stood before it calls for this; a third of it for a critical finding.
    """

    default_on: ClassVar[tuple[str, ...]] = ()
    #: Order at one boundary: the lowest wins, and only one between-step action is applied at a boundary.
    priority: ClassVar[int] = 50
    #: Whether what the detectors learnt about the run no longer holds after it.
    renews: ClassVar[bool] = False
    #: Causes (ids of `gradwatch.diagnosis`) that it takes away, and so comes first for.
    cures: tuple[str, ...] = ()
    #: Whether the weights begin anew.
    begins_anew: ClassVar[bool] = False
    #: Whether it changes the learning rate and nothing else.
    only_rate: ClassVar[bool] = False
    #: Whether it is taken back where the loss ends up worse than it was.
    is_undone: ClassVar[bool] = False

    def __init__(
        self,
        *,
        on: str | Sequence[str] | None = None,
        cooldown: int = 50,
        max_times: int | None = None,
        min_severity: str = "warning",
        within: int = 60,
        tries: int = 1,
        confirm: int = 0,
    ) -> None:
        self.on = self.default_on if on is None else (on,) if isinstance(on, str) else tuple(on)
        for rule in self.on:
            if rule not in RULES:
                raise UnknownNameError.among("rule", rule, RULES)
        if min_severity not in SEVERITIES:
            raise UnknownNameError.among("severity", min_severity, SEVERITIES)
        self.cooldown = require_count("cooldown", cooldown, least=0)
        self.max_times = None if max_times is None else require_count("max_times", max_times)
        self.min_severity = min_severity
        self.within = require_count("within", within)
        self.tries = require_count("tries", tries)
        self.confirm = require_count("confirm", confirm, least=0)

    @abstractmethod
    def respond(self, finding: Finding, step: int, state: RunState) -> Due | None:
        """What to do about a finding that calls for it; None when nothing can be done (any more)."""

    def answers(self, finding: Finding) -> bool:
        """Whether a finding calls for it by its rule and severity."""
        return finding.rule in self.on and SEVERITIES.index(finding.severity) >= SEVERITIES.index(self.min_severity)

    def recover(self, step: int, state: RunState) -> Due | None:
        """What to undo when all is well again; called each time the policy looks and nothing is due."""
        return None

    def config(self) -> dict[str, Any]:
        """See `Action.config`."""
        return {
            "on": list(self.on),
            "cooldown": self.cooldown,
            "max_times": self.max_times,
            "min_severity": self.min_severity,
            "within": self.within,
            "tries": self.tries,
            "confirm": self.confirm,
        }


def keys_of(actions: Sequence[BetweenStepsAction]) -> list[str]:
    """The actions' names, numbered where a name comes again."""
    keys: list[str] = []
    for action in actions:
        again = sum(key.partition("#")[0] == action.name for key in keys)
        keys.append(f"{action.name}#{again + 1}" if again else action.name)
    return keys


@dataclass
class RunState:
    """What actions may know of the run.

    Args:
        lr_factor: gradwatch's own factor on the learning rate.
        rate: The last learning rate, without the factor; NaN while unknown.
        rates: Of the last 1,000 steps, every tenth step and the rate just before it, with the factor.
        last_applied: Action name to the step at which it was last applied.
        times: Action name to how often it was applied.
        well_since: The first step of the present stretch without an open finding; None while one is open.
        first_loss: The first finite loss, or the median of the first few where that is lower; NaN while none is known.
        start_loss: The first finite loss; NaN while none is known.
        loss: Median of the last losses; NaN while none is known, infinite when they are not finite.
        best_loss: The lowest that `loss` has been.
        growth: By how much the loss rose from one step to the next when it first leapt, lately; 1 where it did not.
        learns: Whether the loss has fallen, lately or well below where it began; False while none is known.
        recovery: Step and factor at which the learning rate began its way back; None when it is not on it.
        began: The first step of the present weights: 0, or that of the last initialisation.
        given_up: The lowest loss of weights that were given up because they learnt nothing; infinite before the first.
        recovered: Whether it was on its way back before.
        loss_held: The loss when the way back began.
        failures: "action:rule" to how often in a row the action did not help against the rule.
        undone: Names of actions that were taken back; they are not applied again.
    """

    lr_factor: float = 1.0
    rate: float = math.nan
    rates: list[tuple[int, float]] = field(default_factory=list)
    last_applied: dict[str, int] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    well_since: int | None = 0
    first_loss: float = math.nan
    start_loss: float = math.nan
    loss: float = math.nan
    best_loss: float = math.inf
    growth: float = 1.0
    learns: bool = False
    recovery: tuple[int, float] | None = None
    recovered: bool = False
    loss_held: float = math.nan
    began: int = 0
    given_up: float = math.inf
    failures: dict[str, int] = field(default_factory=dict)
    undone: list[str] = field(default_factory=list)

    @property
    def is_wrecked(self) -> bool:
        """Whether the loss is above where it began: what a smaller rate alone does not bring back."""
        return self.loss > WRECKED * abs(self.first_loss)

    def failed(self, action: str, rule: str) -> int:
        """How often in a row the action did not help against the rule."""
        return self.failures.get(f"{action}:{rule}", 0)


def sound_factor(finding: Finding, most: float) -> float:
    """What to multiply the learning rate by: `most`, or less where updates are too large and it takes less."""
    ratio = float(finding.evidence.get("ratio") or 0.0) if finding.rule == "update_ratio" else 0.0
    return min(most, SOUND_UPDATE / ratio) if ratio > 0 else most


def require_count(name: str, value: int, *, least: int = 1) -> int:
    """`value`, if it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError.of(name, f"an integer >= {least}", value)
    return value


def require_positive(name: str, value: float) -> float:
    """`value` as a float, if it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or not math.isfinite(value):
        raise ConfigurationError.of(name, "a finite number > 0", value)
    return float(value)
