"""The gradients between backward and step: measured once they are complete, then followed through all that is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.backends.torch_backward import BackwardEnd, in_backward
from gradwatch.backends.torch_clips import Clips
from gradwatch.backends.torch_device import beside, host_or_copy
from gradwatch.backends.torch_gradients import Gradients, Held, Measurement, is_damaged
from gradwatch.records import NOT_MEASURED
from gradwatch.rows import global_norm

#: Changes of gradients that we cannot explain, until we believe that the loop makes them and look for no hidden pass.
_BELIEVE = 3
#: A coefficient off by more than this was changed by somebody we did not see.
_OFF = 1e-4
#: Samples at which we look for changes that leave no trace: so many at first, then one in so many.
_LOOKS = 5


@dataclass
class Reading:
    """The gradients of one optimizer as it is about to step; all numbers without the loss scale.

    Args:
        norms: Before clipping, shape (number of parameters,).
        now: As the optimizer is about to use them.
        coefficient: The factor between the two global norms.
        stage: Where `norms` was taken.
        extremes: `grad_max`, `zero_fraction` and `nonfinite_count`, shape (3, number of parameters); None if not
            sampled.
    """

    norms: Any
    now: Any
    coefficient: Any = 1.0
    stage: str = "pre_clip"
    extremes: Any = None


class Pending:
    """Follows the gradients from the end of backward to the step that uses them.

    Args:
        gradients: Measures.
        backward: Has hooks on the parameters whose gradients tell of a backward pass.
    """

    def __init__(self, gradients: Gradients, backward: BackwardEnd) -> None:
        self._gradients, self._backward = gradients, backward
        self._measurement: Measurement | None = None
        self._used: dict[int, Measurement] = {}
        self._scales: dict[int, Any] = {}
        self._clips = Clips()
        self._extremes: Any = None
        self._extremes_scaled = True
        self._is_ours = self.is_announced = True
        #: Whether the loop itself reduces gradients over ranks behind backward: what it makes of them is the gradient.
        self.is_reduced_by_loop = False
        self._unexplained = 0
        self._looks_twice = False
        self._samples = 0
        self._everything = self._hold_all()

    def _hold_all(self) -> Held:
        count = len(self._gradients.parameters)
        return Held(self._gradients.parameters, list(range(count)), count, number=-1)

    def grow(self) -> None:
        """Take note of parameters that were added to the gradients."""
        self._everything = self._hold_all()
        self._measurement = None

    def measure(self) -> None:
        """Measure: the gradients of a backward pass are complete. The last pass before a step counts."""
        measurement = self._measurement = self._gradients.measure()
        self._clips.clear()
        self._scales.clear()
        self._extremes = None
        if measurement.is_damaged:
            # At once: clipping spreads one NaN over all gradients, and then nobody can say where it came from.
            self.sample()

    def sample(self) -> None:
        """Take the sampled statistics of the gradients as they are now, unless they were taken before."""
        if self._extremes is None and self._measurement is not None:
            self._extremes = self._gradients.extremes(self._measurement.grads)
            self._extremes_scaled = not self._scales

    @np.errstate(all="ignore")
    def before_clip(self, places: list[int], max_norm: float, total_norm: Tensor, *, sample: bool) -> None:
        """The user's loop is about to clip the gradients at these places."""
        self._prepare(set(places))
        if sample:
            self.sample()
        self._clips.add(None if len(places) == len(self._gradients.parameters) else places, max_norm, total_norm)

    @np.errstate(all="ignore")
    def before_unscale(self, held: Held, scale: Tensor) -> None:
        """A GradScaler is about to divide the gradients of an optimizer by its scale."""
        self._prepare(set(held.places))
        self._scales[held.number] = host_or_copy(scale)

    def after_change(self) -> None:
        """The change announced before is done: the measurement still stands for these gradients."""
        if self._measurement is not None and self._is_ours and self.is_announced:
            self._measurement.accept_changes(self._gradients.parameters)

    def _prepare(self, places: set[int]) -> None:
        """Before a change that we know of: look for changes that we do not know of."""
        self._is_ours = True
        pending = self._measurement
        if pending is None or (self.is_reduced_by_loop and not (self._clips or self._scales)):
            self.measure()
            return
        changed = [place for place in pending.changed(self._everything) if place in places]
        if not changed:
            return
        if self._is_hidden_pass(pending, changed):
            self._backward.suspect(changed)
            self.measure()
        elif _is_uniform(pending.norms, self._gradients.measure().norms, changed):
            # All scaled alike: averaged over micro-batches or unscaled by hand. What is clipped next is the gradient.
            self.measure()
        else:
            self._is_ours = False

    def _is_hidden_pass(self, pending: Measurement, changed: list[int]) -> bool:
        used = any(measurement is pending for measurement in self._used.values())
        return used or any(pending.grads[place] is None for place in changed)

    def read(self, optimizer: Optimizer, held: Held, *, sample: bool) -> Reading:
        """The gradients that the optimizer is about to use, and what became of them since they were measured."""
        pending, scale = self._measurement, getattr(optimizer, "grad_scale", None)
        changed = held.places if pending is None else pending.changed(held)
        if self.is_reduced_by_loop and not (self._clips or self._scales):
            self.measure()  # a collective leaves no trace in the version
            pending, changed = self._measurement, []
        is_touched = bool(changed or self._scales or self._clips or self._looks_twice or scale is not None)
        if pending is None or is_touched or sample or pending.is_damaged:
            reading = self._read_closely(held, changed, host_or_copy(scale), sample=sample)
        else:
            norms = held.part(pending.norms)
            reading = Reading(norms, norms)
        if self._measurement is not None:
            self._used[held.number] = self._measurement
        return reading

    @np.errstate(all="ignore")
    def _read_closely(self, held: Held, changed: list[int], scale: Any, *, sample: bool) -> Reading:
        pending = self._measurement
        is_stale = pending is None or self._used.get(held.number) is pending
        if changed and (is_stale or pending is None or any(pending.grads[place] is None for place in changed)):
            return self._read_now(held, changed, scale, sample=sample)
        assert pending is not None
        return self._read_pending(pending, held, changed, scale, sample=sample)

    def _read_now(self, held: Held, changed: list[int], scale: Any, *, sample: bool) -> Reading:
        """A pass that no hook of ours has seen, or one that still runs and steps its optimizers on the way."""
        is_running = in_backward()
        if not is_running:
            self._backward.suspect(changed)
        measurement = self._gradients.measure(held)
        if not is_running:
            self._measurement, self._extremes = measurement, None
        norms = held.part(measurement.norms)
        norms = norms / beside(scale, norms)
        reading = Reading(norms, norms, stage="pre_clip" if is_running else "post_clip")
        if sample or is_damaged(norms):
            reading.extremes = _unscaled(self._gradients.extremes(held.of(measurement.grads)), scale)
        return reading

    def _read_pending(
        self, pending: Measurement, held: Held, changed: list[int], scale: Any, *, sample: bool
    ) -> Reading:
        norms, scaled = held.part(pending.norms), self._scales.get(held.number, 1.0)
        norms = norms / beside(beside(scaled, scale) * scale, norms)
        if sample:
            self.sample()
        reading = Reading(
            norms, norms, extremes=self._extremes_of(held, scale) if sample or is_damaged(norms) else None
        )
        factor = beside(self._clips.part(held), norms) if self._clips else 1.0
        if changed and self._unexplained < _BELIEVE:
            self._unexplained += 1
            self._backward.suspect(changed)
        looks = self._looks_twice or (sample and isinstance(norms, np.ndarray) and self._looks_now())
        reading.now, reading.coefficient = _times(norms, factor), _coefficient(norms, factor)
        if not (changed or looks):
            return reading
        now = beside(held.part(self._gradients.measure(held).norms), norms) / beside(scale, norms)
        coefficient = ratio(now, norms)
        if not (changed or self._looks_twice):
            # `p.grad.data.clamp_()` leaves no trace in the version: once it was found out, look at every step.
            self._looks_twice = abs(coefficient - reading.coefficient) > _OFF
        if changed or self._looks_twice:
            reading.now, reading.coefficient = now, coefficient
        return reading

    def _looks_now(self) -> bool:
        """Whether to look for changes without a trace at this sample; a loop that makes any does so from the start."""
        self._samples += 1
        return self._samples <= _LOOKS or self._samples % _LOOKS == 0

    def _extremes_of(self, held: Held, scale: Any) -> Any:
        if self._extremes is None:
            return None
        carried = self._scales.get(held.number, 1.0) * scale if self._extremes_scaled else scale
        return _unscaled(held.part(self._extremes.T).T, carried)

    def forget(self, held: Held) -> None:
        """The gradients have been used: hold them no longer."""
        if self._measurement is not None:
            self._measurement.forget(held)

    def clear(self) -> None:
        """Hold nothing any longer."""
        self._measurement = None
        self._used.clear()
        self._extremes = None


def _unscaled(extremes: Any, scale: Any) -> Any:
    join = torch.cat if isinstance(extremes, Tensor) else np.concatenate
    return join([extremes[:1] / scale, extremes[1:]])


def ratio(now: Any, before: Any) -> Any:
    """Global norm over global norm; 1 where that says nothing."""
    if isinstance(now, Tensor):
        found = _device_norm(now) / _device_norm(before)
        return torch.where(torch.isfinite(found), found, 1.0)
    top, bottom = global_norm(now), global_norm(before)
    return top / bottom if 0 < bottom < math.inf and math.isfinite(top) else 1.0


def _device_norm(norms: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.where(norms == NOT_MEASURED, 0.0, norms))
    return norm


def _times(norms: Any, factor: Any) -> Any:
    """Norms times factors, where what was not measured stays so whatever the factor."""
    if isinstance(factor, float) and factor == 1.0:
        return norms
    if isinstance(norms, Tensor):
        return torch.where(norms == NOT_MEASURED, norms, norms * factor)
    return np.where(
        norms == NOT_MEASURED, norms, norms * np.float32(factor) if np.ndim(factor) == 0 else norms * factor
    )


def _coefficient(norms: Any, factor: Any) -> Any:
    return factor if np.ndim(factor) == 0 else ratio(_times(norms, factor), norms)


def _is_uniform(before: Any, now: Any, places: list[int]) -> bool:
    """Whether all norms changed by the same factor. On an accelerator nobody waits to find out: taken to be so."""
    if isinstance(before, Tensor):
        return True
    then, after = before[places].astype(np.float64), now[places].astype(np.float64)
    seen = (then > 0) & np.isfinite(then) & np.isfinite(after)
    factors = after[seen] / then[seen]
    return bool(len(factors) == 0 or factors.max() - factors.min() <= 1e-3 * factors.max())
