"""What the in-step actions decide from the norms of a step, on the host or on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradwatch.actions.base import InStepAction
from gradwatch.backends.torch_device import TorchNamespace
from gradwatch.records import NOT_MEASURED

ByUnit = Callable[[InStepAction, Any], Any]


@dataclass
class Verdict:
    """What is to be done to the gradients of one optimizer's step.

    Args:
        coefficient: Factor on the global norm that results; a number or a scalar tensor.
        scale: Factor for all gradients, or one for each parameter; None leaves them alone.
        clip_value: Limit of each element, applied after `scale`; None for no limit.
        skip: Whether to leave out the step; a bool or a boolean scalar tensor.
        norm: The global norm that was decided on.
    """

    coefficient: Any = 1.0
    scale: Any = None
    clip_value: float | None = None
    skip: Any = False
    norm: Any = math.nan


class Decider:
    """Runs the in-step actions and keeps their state.

    Args:
        actions: In order; but skips come first, and what works unit by unit before what works on norms.
    """

    def __init__(self, actions: Sequence[InStepAction]) -> None:
        self._actions = sorted(actions, key=lambda action: (action.name != "SkipStep", not action.by_unit))
        self.begin()
        self.can_skip = any(action.name == "SkipStep" for action in actions)

    def __bool__(self) -> bool:
        return bool(self._actions)

    def begin(self) -> None:
        """Learn anew what is usual: norms of other weights say nothing about those to come."""
        self._states: list[tuple[Any, ...]] = [tuple(action.initial_state()) for action in self._actions]

    def decide(self, norms: Any, by_unit: ByUnit) -> Verdict:
        """The verdict over gradient norms.

        Args:
            norms: Shape (p,), `NOT_MEASURED` where there is no gradient.
            by_unit: Lets an action work on the units of the gradients at once; returns the norms afterwards.
        """
        return self._on_device(norms, by_unit) if isinstance(norms, Tensor) else self._on_host(norms, by_unit)

    def _on_host(self, norms: npt.NDArray[np.float32], by_unit: ByUnit) -> Verdict:
        used = np.where(norms == NOT_MEASURED, 0.0, norms).astype(np.float64)
        before = after = float(np.sqrt(used @ used))
        scale: Any = None
        limit: float | None = None
        for i, action in enumerate(self._actions):
            decision = action.decide(used, self._states[i], np)
            self._states[i] = decision.state
            if decision.skip is not None and bool(decision.skip):
                return Verdict(skip=True, norm=before)
            if action.by_unit and math.isfinite(before):
                used = by_unit(action, used)
                after = float(np.sqrt(used @ used))
            # A factor from a norm that is not finite would carry the damage of one parameter to all.
            if decision.scale is not None and np.all(np.isfinite(decision.scale)) and math.isfinite(before):
                scale = decision.scale if scale is None else scale * decision.scale
                used = used * decision.scale
                after = float(np.sqrt(used @ used))
            limit = _stricter(limit, action.clip_value)
        coefficient = after / before if before > 0 and math.isfinite(before) else 1.0
        return Verdict(coefficient, scale, limit, norm=before)

    def _on_device(self, norms: Tensor, by_unit: ByUnit) -> Verdict:
        """The same without a branch on a number: what is decided is computed, and the kernels follow it."""
        xp = TorchNamespace
        used = torch.where(norms == NOT_MEASURED, 0.0, norms)
        before = torch.linalg.vector_norm(used)
        skip: Any = False
        scale: Any = None
        limit: float | None = None
        for i, action in enumerate(self._actions):
            state = _on(norms.device, self._states[i])
            decision = action.decide(used, state, xp)
            self._states[i] = tuple(
                new if skip is False else torch.where(skip, old, new)
                for old, new in zip(state, decision.state, strict=True)
            )
            if action.by_unit:
                used = by_unit(action, used)
            if decision.skip is not None:
                skip = decision.skip if skip is False else skip | decision.skip
            if decision.scale is not None:
                factor = torch.where(torch.isfinite(decision.scale) & torch.isfinite(before), decision.scale, 1.0)
                scale = factor if scale is None else scale * factor
                used = used * factor
            limit = _stricter(limit, action.clip_value)
        ratio = torch.linalg.vector_norm(used) / before
        coefficient = torch.where(torch.isfinite(ratio), ratio, 1.0)
        return Verdict(coefficient, scale, limit, skip, norm=before)

    def state_dict(self) -> list[list[Any]]:
        """The actions' states as numbers and lists."""
        return [[_host(entry).tolist() for entry in state] for state in self._states]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Go on from `state_dict`."""
        self._states = [
            tuple(entry if np.ndim(entry) == 0 else np.array(entry) for entry in entries) for entries in state
        ]


def _stricter(limit: float | None, other: float | None) -> float | None:
    return other if limit is None else limit if other is None else min(limit, other)


def _host(entry: Any) -> npt.NDArray[Any]:
    return np.asarray(entry.cpu() if isinstance(entry, Tensor) else entry)


def _on(device: torch.device, state: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        entry.to(device, non_blocking=True) if isinstance(entry, Tensor) else _moved(entry, device) for entry in state
    )


def _moved(entry: Any, device: torch.device) -> Tensor:
    # Filling a scalar needs no copy from the host; an array is copied once, at the first step.
    if np.ndim(entry) == 0:
        return torch.full((), float(entry), device=device)
    return torch.as_tensor(np.asarray(entry, np.float32)).to(device)
