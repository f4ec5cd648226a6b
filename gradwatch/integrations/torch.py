"""`gradwatch.watch` for PyTorch: where in the user's loop we are called.

Gradients are measured at the end of backward, before anything can clip them: hooks on the few parameters whose gradients
arrive first and last queue one callback that autograd runs when the backward pass is over. The optimizer's own step hooks
tell which optimizer steps, when, and with which learning rate. A gradient that changed in between was clipped or unscaled;
the taps say by what. No hook sits on a module, so compiled, pickled, copied and in-place models work as ever.

A row of the record is opened by an optimizer's step and closed when the same optimizer is about to step again, so that
`watcher.log(loss=loss)` behind `optimizer.step()` belongs to the step before it, and two optimizers of a GAN share a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.actions.base import Due
from gradwatch.backends import torch_taps
from gradwatch.backends.torch_backward import BackwardEnd, in_backward
from gradwatch.backends.torch_gradients import Gradients, Measurement
from gradwatch.backends.torch_model import by_execution, describe, held_by, outsider
from gradwatch.backends.torch_statistics import Updates, gradient_statistics
from gradwatch.backends.torch_step import ScaledLR, Skip, clip_values, scale_gradients
from gradwatch.errors import ModelError
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, STAGES, Floats
from gradwatch.watcher import Watcher, global_norm, number

_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_
_MOST_RATES = 8  # learning rates recorded: optimizers, and groups of one


@dataclass
class _Row:
    """The step in progress."""

    norms: npt.NDArray[np.float32]
    metrics: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Floats] = field(default_factory=dict)
    stepped: set[int] = field(default_factory=set)
    stage: str = "pre_clip"
    skip_reason: str = ""
    is_sampled: bool = False


@dataclass
class _Step:
    """One optimizer's step in progress: what must be undone and finished when it is over."""

    places: list[int]
    closure_runs: int = 0
    has_closure: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list)
    updates: Updates | None = None


class TorchWatcher(Watcher):
    """Watches a PyTorch model; made by `gradwatch.watch`.

    Args:
        model: The model.
        optimizers: The optimizers; empty watches every optimizer that holds parameters of the model.
        loss_fn: A loss module whose output is the loss of the step, so that no call of `log` is needed.
        settings: Keyword arguments of `gradwatch.watcher.Settings`.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], *, loss_fn: nn.Module | None = None, **settings: Any
    ) -> None:
        described, tensors = describe(model, optimizers)
        super().__init__(described, framework="torch", **settings)
        self._gradients = Gradients(tensors)
        self._place = {id(tensor): place for place, tensor in enumerate(tensors)}
        self._held: dict[int, tuple[int, list[int]]] = {}
        self._pending: Measurement | None = None
        self._clipped = 1.0
        self._row: _Row | None = None
        self._steps: dict[int, _Step] = {}
        self._in_step_state = {action.name: action.initial_state() for action in self._policy.in_step}
        self._scaler_stepped = False
        self._is_compiled = _is_compiled(model)
        self._is_first_backward = True
        self._changes_unseen = False
        self._backward_since_step = False
        self._logged_next: dict[str, float] = {}
        self._backward = BackwardEnd(self._gradients.parameters, self._guarded(self._after_backward))
        self._handles: list[Any] = []
        self._attach(optimizers, loss_fn)

    def _attach(self, optimizers: Sequence[Optimizer], loss_fn: nn.Module | None) -> None:
        if optimizers:
            for optimizer in optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._guarded(self._before_step)))
                self._handles.append(optimizer.register_step_post_hook(self._guarded(self._after_step)))
        else:
            hooks = torch.optim.optimizer
            self._handles.append(hooks.register_optimizer_step_pre_hook(self._guarded(self._before_step)))
            self._handles.append(hooks.register_optimizer_step_post_hook(self._guarded(self._after_step)))
        if loss_fn is not None:
            self._handles.append(loss_fn.register_forward_hook(_LossHook(self)))
        torch_taps.listen(self)

    def _guarded(self, function: Callable[..., None]) -> Callable[..., None]:
        """A hook whose failures stay ours, and whose time is counted."""

        def hook(*args: Any) -> None:
            started = time.perf_counter()
            self.faults.call("torch hooks", function, *args, default=None)
            self._hook_seconds += time.perf_counter() - started

        return hook

    def _after_backward(self) -> None:
        """The gradients of this backward pass are complete; the last pass before a step counts."""
        if self._is_first_backward:
            self._is_first_backward = False
            arrivals = self._backward.learned()
            if not self._is_compiled:  # a compiled backward hands over its gradients in no telling order
                self._redescribe(by_execution(self._parameters, arrivals))
        self._clipped = 1.0
        self._backward_since_step = True
        running = next((step for step in self._steps.values() if step.has_closure), None)
        if running is None:
            self._pending = self._gradients.measure(range(len(self._gradients.parameters)))
            return
        # Inside a step with a closure, the first evaluation is the gradient of the step; others are a line search.
        running.closure_runs += 1
        if running.closure_runs == 1 and self._row is not None:
            self._take_gradients(running, self._gradients.measure(running.places), 1.0)

    def _places_of(self, optimizer: Optimizer) -> list[int]:
        """Places of the parameters an optimizer holds now; new ones become new columns."""
        held = held_by(optimizer)
        known = self._held.get(id(optimizer))
        if known is not None and known[0] == len(held):
            return known[1]
        new = [parameter for parameter in held if id(parameter) not in self._place]
        if new and known is None and not any(id(parameter) in self._place for parameter in held):
            return []
        for parameter in new:
            self._add_parameter(parameter)
        places = [self._place[id(parameter)] for parameter in held]
        self._held[id(optimizer)] = (len(held), places)
        return places

    def _add_parameter(self, parameter: nn.Parameter) -> None:
        place = len(self._gradients.parameters)
        self._place[id(parameter)] = place
        self._gradients.parameters.append(parameter)
        if self._row is not None:
            self._row.norms = np.append(self._row.norms, np.float32(NOT_MEASURED))
        self._gain(outsider(f"added.{place}", parameter, depth=1 + max(p.depth for p in self._parameters)))
        self._backward.add([place])

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._scaler_stepped = True
        places = self._places_of(optimizer)
        if not places:
            return
        key = id(optimizer)
        self._undo(key)
        row = self._begin(key, optimizer)
        self._backward_since_step = False
        step = _Step(places, has_closure=len(args) > 1 or kwargs.get("closure") is not None)
        self._steps[key] = step
        if self._policy.state.lr_factor != 1.0 and not self.settings.dry_run:
            step.undo.append(ScaledLR(optimizer, self._policy.state.lr_factor).undo)
        if row.is_sampled:
            step.updates = Updates(places, [self._gradients.parameters[place] for place in places])
        if not step.has_closure:
            measurement, coefficient = self._current(optimizer, places, row)
            self._take_gradients(step, measurement, coefficient)

    def _begin(self, key: int, optimizer: Optimizer) -> _Row:
        """The row that this optimizer's step belongs to; closes the one before when it has its step already."""
        if self._row is not None and key in self._row.stepped:
            self._finish_row()
            self._logged, self._logged_next = self._logged_next, {}
        if self._row is None:
            self._row = _Row(
                np.full(len(self._gradients.parameters), NOT_MEASURED, np.float32),
                {"time": time.time()},
                is_sampled=self._next_step % self.settings.stats_every == 0,
            )
        self._row.stepped.add(key)
        number = list(self._held).index(key)
        for place, group in enumerate(optimizer.param_groups[:_MOST_RATES]):
            if number < _MOST_RATES and "lr" in group:
                self._row.metrics["lr" if number == place == 0 else f"lr.{number}.{place}"] = float(group["lr"])
        return self._row

    def _current(self, optimizer: Optimizer, places: list[int], row: _Row) -> tuple[Measurement, float]:
        """The norms before clipping, and what the user's loop multiplied the gradients by since."""
        pending, parameters = self._pending, self._gradients.parameters
        scale = getattr(optimizer, "grad_scale", None)
        if pending is None or not any(place in pending.grads for place in places):
            measurement = self._gradients.measure(places)
            self._backward.add([] if in_backward() else measurement.grads)
            self._apply_scale(measurement, scale)
            return measurement, 1.0
        changed = pending.changed(places, parameters)
        if unseen := [place for place in changed if place not in self._backward]:
            # Perhaps a backward pass that none of our hooks saw: from now on they sit here too.
            self._backward.add(unseen)
            row.stage = "post_clip"
            measurement = self._gradients.measure(places)
            self._apply_scale(measurement, scale)
            return measurement, 1.0
        self._apply_scale(pending, scale)
        if scale is not None or not (changed or self._changes_unseen or row.is_sampled):
            return pending, self._clipped
        coefficient = self._ratio(pending, places)
        # `p.grad.data.clamp_()` leaves no trace in the version: once it was found out, look at every step.
        self._changes_unseen = self._changes_unseen or (not changed and abs(coefficient - self._clipped) > 1e-4)
        if not (changed or self._changes_unseen) and self._steps_seen == 0:
            self._backward.thin()
        return pending, coefficient if changed or self._changes_unseen else self._clipped

    def _ratio(self, pending: Measurement, places: list[int]) -> float:
        """By how much the gradients were scaled since they were measured, whoever did it."""
        now = global_norm(self._gradients.measure(places).norms[places])
        before = global_norm(pending.true_norms(np.array(places)))
        return now / before if 0 < before < math.inf and math.isfinite(now) else 1.0

    @staticmethod
    def _apply_scale(measurement: Measurement, scale: Tensor | None) -> None:
        if scale is not None:
            measurement.scale = float(scale)

    def _take_gradients(self, step: _Step, measurement: Measurement, coefficient: float) -> None:
        """Put the norms into the row and run the in-step actions."""
        row = self._row
        assert row is not None
        places = np.array(step.places)
        norms = measurement.true_norms(places)
        row.norms[places] = norms
        if row.is_sampled or not np.isfinite(norms[norms != NOT_MEASURED]).all():
            grads = {place: measurement.grads[place] for place in step.places if place in measurement.grads}
            self._merge(gradient_statistics(grads, len(row.norms), scale=measurement.scale))
        coefficient *= self._act_in_step(step, norms * np.float32(coefficient))
        row.metrics["clip_coefficient"] = min(coefficient, row.metrics.get("clip_coefficient", math.inf))

    def _act_in_step(self, step: _Step, norms: npt.NDArray[np.float32]) -> float:
        """Skip or scale as the in-step actions decide; returns the factor on the global norm."""
        row = self._row
        assert row is not None
        parameters = [self._gradients.parameters[place] for place in step.places]
        present = norms != NOT_MEASURED
        used = np.where(present, norms, 0.0).astype(np.float64)
        before = float(np.sqrt(np.sum(used * used)))
        for action in self._policy.in_step:
            decision = action.decide(used, self._in_step_state[action.name], np)
            self._in_step_state[action.name] = decision.state
            if decision.skip is not None and bool(decision.skip):
                row.skip_reason = "spike" if math.isfinite(before) else "nonfinite"
                if not self.settings.dry_run:
                    step.undo.append(Skip(parameters).undo)
                return 1.0
            if self.settings.dry_run:
                continue
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if decision.scale is not None:
                scale_gradients(grads, decision.scale if np.ndim(decision.scale) == 0 else decision.scale[present])
                used = used * decision.scale
            if action.clip_value is not None:
                clip_values(grads, action.clip_value)
        after = float(np.sqrt(np.sum(used * used)))
        return after / before if before > 0 and math.isfinite(before) else 1.0

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._steps.get(id(optimizer))
        if step is None or self._row is None:
            return
        self._undo(id(optimizer))
        if step.updates is not None:
            self._merge(step.updates.finish(len(self._row.norms)))
        if self._pending is not None:
            self._pending.forget(step.places)

    def _undo(self, key: int) -> None:
        step = self._steps.pop(key, None)
        for undo in step.undo if step else ():
            undo()

    def _merge(self, statistics: dict[str, Floats]) -> None:
        """Add statistics of one optimizer's parameters to the row."""
        assert self._row is not None
        for name, values in statistics.items():
            known = self._row.statistics.get(name)
            self._row.statistics[name] = values if known is None else np.where(values != NOT_MEASURED, values, known)

    def _finish_row(self) -> None:
        row, self._row = self._row, None
        if row is None:
            return
        row.metrics["hook_time"] = self._hook_seconds - self._hook_seconds_before
        self._hook_seconds_before = self._hook_seconds
        due = self._close_row(
            row.norms,
            row.metrics,
            statistics=row.statistics,
            stage=STAGES.index(row.stage),
            skip_reason=SKIP_REASONS.index(row.skip_reason),
        )
        if due is not None:
            self._apply(due)

    def _apply(self, due: Due) -> None:
        """Apply a between-step action; the learning-rate factor takes effect at the next step."""
        if not self.settings.dry_run and due.action.name == "DecayLR":
            self._policy.state.lr_factor = due.after
        self.applied(due)

    def log(self, **numbers: Any) -> None:
        """See `Watcher.log`; numbers logged between backward and step belong to that step."""
        self._require_open()
        target = self._logged_next if self._backward_since_step and self._row is not None else self._logged
        for name, value in numbers.items():
            target[name] = number(name, value)

    def before_clip(self, parameters: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
        """Called by the taps before the user's loop clips."""
        if any(id(parameter) in self._place for parameter in parameters):
            norm = float(total_norm)
            if math.isinf(max_norm) and not math.isfinite(norm):
                self.mark(f"clip_grad_norm_(max_norm=inf) at norm {norm} turns every gradient into NaN")
            self._clipped *= min(1.0, max_norm / (norm + _EPSILON)) if norm < math.inf else 1.0

    def after_change(self) -> None:
        """Called by the taps after they changed gradients: the pending measurement still stands for them."""
        if self._pending is not None:
            self._pending.accept_changes()

    def before_unscale(self, optimizer: Optimizer, scale: Tensor) -> None:
        """Called by the taps before a GradScaler divides the gradients of an optimizer by its scale."""
        if self._pending is not None and self._places_of(optimizer):
            self._pending.scale = float(scale)

    def before_scaler_step(self, optimizer: Optimizer) -> None:
        """Called by the taps before a GradScaler steps or decides not to."""
        self._scaler_stepped = False

    def after_scaler_step(self, optimizer: Optimizer, scale: Tensor) -> None:
        """Called by the taps after it: when no step was taken, the scaler found an overflow."""
        places = self._places_of(optimizer)
        if self._scaler_stepped or not places:
            return
        row = self._begin(id(optimizer), optimizer)
        pending = self._pending or self._gradients.measure(places)
        row.norms[places] = pending.true_norms(np.array(places))
        row.skip_reason = "grad_scaler"
        row.metrics["grad_scale"] = float(scale)
        self._pending = None

    def close(self, status: str = "finished", detail: str = "") -> None:
        """See `Watcher.close`."""
        if self._closed:
            return
        torch_taps.leave(self)
        self._backward.remove()
        for handle in self._handles:
            handle.remove()
        for key in list(self._steps):
            self._undo(key)
        self.faults.call("torch hooks", self._finish_row, default=None)
        self._pending = None
        super().close(status, detail)


class _LossHook:
    """Logs the output of a loss module; inert in copies and pickles of it."""

    def __init__(self, watcher: TorchWatcher | None = None) -> None:
        self._watcher = watcher

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._watcher is not None and isinstance(output, Tensor) and output.numel() == 1 and module.training:
            self._watcher.faults.call("loss hook", self._watcher.log, loss=output.detach(), default=None)

    def __reduce__(self) -> tuple[type[_LossHook], tuple[()]]:
        return _LossHook, ()


def _is_compiled(model: nn.Module) -> bool:
    return any(name.endswith("_orig_mod") or "_orig_mod." in name for name, _ in model.named_modules())


def watch_torch(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None, **settings: Any
) -> TorchWatcher:
    """See `gradwatch.watch`."""
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise ModelError(f"'optimizer' must be a torch.optim.Optimizer, a list of them, or None: {each!r}")
    loss_fn = settings.get("loss_fn")
    if loss_fn is not None and not isinstance(loss_fn, nn.Module):
        raise ModelError(f"'loss_fn' must be a torch.nn.Module: {loss_fn!r}")
    return TorchWatcher(model, optimizers, **settings)
