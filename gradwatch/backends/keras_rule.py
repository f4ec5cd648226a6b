"""What happens to the gradients inside a Keras step: measure, decide, scale; written once for every backend.

The gradients that an optimizer is handed are not yet those that it uses: a loss scale is still on them, and with
gradient accumulation earlier micro-batches are missing. Norms and decisions are those of the gradient that the update
will use, before the optimizer's own clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from keras import ops

from gradwatch.actions.base import InStepAction
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, Floats

Tensor = Any
#: What follows the norms in a row: which optimizer, its learning rate, the loss, the factor on the global norm, an
#: index into SKIP_REASONS, 0 while the gradient only accumulates, and the dynamic loss scale that the step used.
EXTRAS = ("optimizer", "lr", "loss", "coefficient", "skip", "is_update", "grad_scale")
_NONFINITE, _SPIKE, _SCALER = (SKIP_REASONS.index(reason) for reason in ("nonfinite", "spike", "grad_scaler"))


@dataclass
class Gradients:
    """The gradients of one optimizer's call that can be measured.

    Args:
        places: Their places in the call's list; None gradients and variables that are overwritten are left out.
        columns: Their columns in the record.
        tensors: The gradients, with those of earlier micro-batches added.
        factor: What makes their norms those of the update: 1 / loss scale, or 1 / number of micro-batches.
        scale: The loss scale that is still on the gradients handed over; None for none.
        accumulators: Variables that hold the earlier micro-batches, one for each; empty without accumulation.
        is_update: Boolean scalar, False while gradients only accumulate; None without accumulation.
    """

    places: list[int]
    columns: list[int]
    tensors: list[Tensor]
    factor: Tensor | float = 1.0
    scale: Tensor | float | None = None
    accumulators: list[Any] = field(default_factory=list)
    is_update: Tensor | None = None


@dataclass
class Verdict:
    """What the in-step actions want.

    Args:
        scale: Factor for all gradients (a scalar) or for each (shape (n,)); None leaves them alone.
        limit: Limit of each element; None for no limit.
        skip: Boolean scalar; None when no action skips.
        reason: Index into SKIP_REASONS, a float scalar.
        coefficient: Factor on the global norm.
        state: What the actions remember.
        by_unit: Actions that scale gradients unit by unit.
        edited: The gradients to hand to the optimizer, where actions may change them.
    """

    scale: Tensor | None
    limit: float | None
    skip: Tensor | None
    reason: Tensor
    coefficient: Tensor
    state: list[Tensor]
    by_unit: list[InStepAction]
    edited: list[Tensor | None] = field(default_factory=list)


class Rule:
    """The in-step actions of a run, as one pure function of norms and state.

    Args:
        actions: In the order in which they act, skips first.
        dry_run: Decide and record, but change nothing.
    """

    def __init__(self, actions: Sequence[InStepAction], *, dry_run: bool = False) -> None:
        self.actions, self.dry_run = tuple(actions), dry_run

    @property
    def acts(self) -> bool:
        """Whether gradients may be changed."""
        return bool(self.actions) and not self.dry_run

    def initial_state(self) -> list[Floats]:
        """What the actions remember before the first step: a flat list of float32 arrays."""
        return [np.asarray(value, np.float32) for action in self.actions for value in action.initial_state()]

    def __call__(self, norms: Tensor, state: Sequence[Tensor], *, gradients: Gradients, is_scaled: bool) -> Verdict:
        """Decide.

        Args:
            norms: Shape (n,), of the gradients of this call.
            state: As from `initial_state`, or from the last verdict.
            gradients: For `is_update`.
            is_scaled: A LossScaleOptimizer will see these gradients: what is not finite is its business.
        """
        before = ops.sqrt(ops.sum(norms * norms))
        finite = ops.isfinite(before)
        used, scale, skip, later = norms, None, None, []
        remaining = list(state)
        for action in self.actions:
            count = len(action.initial_state())
            own, remaining = tuple(remaining[:count]), remaining[count:]
            decision = action.decide(used, own, ops)
            new = [ops.cast(value, "float32") for value in decision.state]
            later += new if skip is None else [ops.where(skip, o, n) for o, n in zip(own, new, strict=True)]
            if decision.skip is not None:
                skip = decision.skip if skip is None else ops.logical_or(skip, decision.skip)
            if decision.scale is not None:
                # A factor from a norm that is not finite would carry the damage of one parameter to all.
                sound = ops.logical_and(ops.isfinite(decision.scale), finite)
                factor = ops.where(sound, decision.scale, 1.0)
                scale = factor if scale is None else scale * factor
                used = used * factor
        if gradients.is_update is not None:
            later = [ops.where(gradients.is_update, n, o) for n, o in zip(later, state, strict=True)]
            skip = None if skip is None else ops.logical_and(skip, gradients.is_update)
        if is_scaled and skip is not None:
            skip = ops.logical_and(skip, finite)
        measurable = ops.logical_and(finite, before > 0)
        ratio = ops.sqrt(ops.sum(used * used)) / ops.where(measurable, before, 1.0)
        return Verdict(
            scale=scale,
            limit=min((a.clip_value for a in self.actions if a.clip_value is not None), default=None),
            skip=skip,
            reason=_reason(skip, finite, is_scaled=is_scaled),
            coefficient=_unless(skip, ops.where(measurable, ratio, 1.0)),
            state=later,
            by_unit=[action for action in self.actions if action.by_unit],
        )


def _reason(skip: Tensor | None, finite: Tensor, *, is_scaled: bool) -> Tensor:
    reason = 0.0 if skip is None else ops.where(skip, ops.where(finite, float(_SPIKE), float(_NONFINITE)), 0.0)
    return ops.where(finite, reason, float(_SCALER)) if is_scaled else ops.cast(reason, "float32")


def _unless(skip: Tensor | None, coefficient: Tensor) -> Tensor:
    return coefficient if skip is None else ops.where(skip, 1.0, coefficient)


def base_of(optimizer: Any) -> Any:
    """The optimizer that updates: what a LossScaleOptimizer wraps, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def is_loss_scaled(optimizer: Any) -> bool:
    """Whether this is a LossScaleOptimizer, which skips what is not finite by itself."""
    return base_of(optimizer) is not optimizer


def gather(
    optimizer: Any,
    grads: Sequence[Tensor | None],
    variables: Sequence[Any],
    column_of: Callable[[Any], int | None],
    *,
    value_of: Callable[[Any], Tensor],
) -> Gradients:
    """What of a call's gradients is to be measured.

    Args:
        optimizer: The one that was called.
        grads: As handed over.
        variables: Keras variables, one for each.
        column_of: Gives the column of a variable.
        value_of: Reads an optimizer variable inside the step.
    """
    base = base_of(optimizer)
    measured = [
        (place, column, grad)
        for place, (grad, variable) in enumerate(zip(grads, variables, strict=True))
        if grad is not None and (column := column_of(variable)) is not None and not overwritten(variable)
    ]
    places = [place for place, _, _ in measured]
    found = Gradients(places, [column for _, column, _ in measured], [grad for _, _, grad in measured])
    if is_loss_scaled(optimizer):
        found.scale = value_of(optimizer.dynamic_scale)
    elif base.loss_scale_factor is not None:
        found.scale = base.loss_scale_factor
    steps = base.gradient_accumulation_steps
    if steps and base.built:
        found.accumulators = [base._accumulated_gradients[base._get_variable_index(variables[p])] for p in places]
        unscaled = found.tensors if found.scale is None else [grad / found.scale for grad in found.tensors]
        found.tensors = [grad + value_of(old) for grad, old in zip(unscaled, found.accumulators, strict=True)]
        found.is_update = ops.equal((value_of(base._iterations) + 1) % steps, 0)
        found.factor = 1.0 / steps
    elif found.scale is not None:
        found.factor = 1.0 / found.scale
    return found


def overwritten(variable: Any) -> bool:
    """Whether a variable takes its "gradient" as its new value, as the scales of float8 training do."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


class Hands(Protocol):
    """What a backend can do to a gradient, which may be sparse."""

    columns: Any

    def multiply(self, grad: Tensor, scale: Tensor) -> Tensor: ...
    def limit(self, grad: Tensor, limit: Tensor) -> Tensor: ...
    def by_unit(self, grad: Tensor, weight: Tensor, scale_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor: ...


def edited(
    grads: Sequence[Tensor | None], gradients: Gradients, verdict: Verdict, *, weights: Sequence[Tensor], hands: Hands
) -> list[Tensor | None]:
    """The gradients to hand to the optimizer instead: scaled and clipped as the actions want.

    With accumulation the sum of the micro-batches is scaled and handed over whole; the caller empties the accumulators.

    Args:
        grads: As handed over.
        gradients: What of them was measured.
        verdict: Over these.
        weights: The values of the variables, one for each gradient.
        hands: The backend.
    """
    result = list(grads)
    parameters = hands.columns.parameters
    deepest = max((parameters[column].depth for column in gradients.columns), default=0)
    for i, (place, column) in enumerate(zip(gradients.places, gradients.columns, strict=True)):
        grad, parameter = gradients.tensors[i], parameters[column]
        if verdict.scale is not None:
            grad = hands.multiply(grad, verdict.scale if len(ops.shape(verdict.scale)) == 0 else verdict.scale[i])
        for action in verdict.by_unit:
            if not action.spares(parameter, is_last=parameter.depth == deepest):
                grad = hands.by_unit(grad, weights[place], _unit_scale(action, gradients.factor))
        if verdict.limit is not None:
            grad = hands.limit(grad, verdict.limit / gradients.factor)
        if gradients.is_update is not None:
            whole = grad if gradients.scale is None else grad * gradients.scale
            grad = ops.where(gradients.is_update, whole, grads[place])
        result[place] = grad
    return result


def _unit_scale(action: InStepAction, factor: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda grad_norm, weight_norm: action.unit_scale(grad_norm * factor, weight_norm, ops)


def row(norms: Tensor, gradients: Gradients, extras: dict[str, Tensor | float], *, width: int) -> Tensor:
    """One row of the record: norms in their columns, what was not measured elsewhere, then the extras.

    Args:
        norms: Shape (n,), of the gradients of one call.
        gradients: For their columns.
        extras: Names of `EXTRAS` to scalars.
        width: Number of columns.

    Returns:
        float32, shape (width + len(EXTRAS),).
    """
    tail = ops.stack([ops.cast(extras.get(name, NOT_MEASURED), "float32") for name in EXTRAS])
    if gradients.columns != list(range(width)):
        place = {column: i for i, column in enumerate(gradients.columns)}
        index = np.array([place.get(column, len(place)) for column in range(width)], np.int32)
        blank = ops.convert_to_tensor(np.array([NOT_MEASURED], np.float32))
        norms = ops.take(ops.concatenate([norms, blank]), index)
    return ops.concatenate([norms, tail])
