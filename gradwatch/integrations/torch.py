"""`gradwatch.watch` for PyTorch: where in the user's loop we are called.

Gradients are measured at the end of backward, before anything can clip them: hooks on the few parameters whose
gradients arrive first and last queue one callback that autograd runs when the backward pass is over. The step hooks of
the optimizers tell which one steps, when, and with which learning rate. A gradient that changed in between was clipped
or unscaled; the taps say by what. No hook sits on a module: compiled, pickled, copied and in-place models work as ever.

A row of the record is opened by a step of an optimizer and closed when the same optimizer is about to step again, so
that `watcher.log(loss=loss)` behind `optimizer.step()` belongs to that step, and the optimizers of a GAN share a row.
Numbers of an accelerator are not waited for: such a row is recorded `LAG` rows later, by when they have arrived.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.actions.base import Due
from gradwatch.backends.torch_activations import ActivationSampler, activation_modules, by_statistic
from gradwatch.backends.torch_backward import BackwardEnd, in_backward
from gradwatch.backends.torch_clips import EPSILON
from gradwatch.backends.torch_device import host_or_copy, on_host
from gradwatch.backends.torch_gradients import Gradients, Held
from gradwatch.backends.torch_graph import Uses, read_graph
from gradwatch.backends.torch_model import by_execution, describe, is_compiled, outsider, with_uses
from gradwatch.backends.torch_sharding import whole
from gradwatch.backends.torch_statistics import GRADIENT_STATISTICS, Finish, update_statistics
from gradwatch.backends.torch_step import KeptCounters, ScaledLR
from gradwatch.integrations.torch_attach import attach
from gradwatch.integrations.torch_between import BetweenSteps
from gradwatch.integrations.torch_closure import closure_of, telling
from gradwatch.integrations.torch_guard import Guard
from gradwatch.integrations.torch_holders import Holders
from gradwatch.integrations.torch_in_step import InStep
from gradwatch.integrations.torch_pending import Pending, Reading
from gradwatch.integrations.torch_row import Logbook, Row, Step, is_nested, logged_number
from gradwatch.records import SKIP_REASONS, STAGES
from gradwatch.settings import Options, TorchOptions
from gradwatch.watcher import Watcher

#: Rows that are closed before one whose numbers come from an accelerator: fixed, so that runs act at the same steps.
LAG = 2


class TorchWatcher(Watcher):
    """Watches a PyTorch model; made by `gradwatch.watch`.

    Args:
        model: The model.
        optimizers: The optimizers; empty watches every optimizer that holds parameters of the model.
        settings: Keyword arguments of `gradwatch.settings.Settings`, and `loss_fn`: a loss module whose output is the
            loss of the step, so that no call of `log` is needed.
    """

    _is_set_up = False

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], **settings: Unpack[TorchOptions]) -> None:
        described, tensors = describe(model, optimizers)
        modules = activation_modules(model) if settings.get("activations") else {}
        self._detach: Callable[[], object] = lambda: None
        loss_fn = settings.pop("loss_fn", None)
        shared: Options = settings
        super().__init__(described, framework="torch", modules=list(modules), **shared)
        try:
            self._set_up(model, optimizers, modules, tensors)
            self._detach = attach(self, optimizers, loss_fn)
        except BaseException:
            self.close("crashed", "could not attach")
            raise

    def _set_up(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        modules: dict[str, nn.Module],
        tensors: Sequence[nn.Parameter],
    ) -> None:
        self._activations = ActivationSampler(modules, partial(self.faults.call, "activations", default=None))
        self._gradients = Gradients(tensors)
        self._holders = Holders(self._gradients, self._gain_parameter)
        self.safely = Guard(self.faults, self._put_right)
        self._backward = BackwardEnd(
            self._gradients.parameters, self.safely.hook(self._after_backward), self.safely.failed
        )
        self.pending = Pending(self._gradients, self._backward)
        self._row: Row | None = None
        self._steps: dict[int, Step] = {}
        self._running_closure: Step | None = None
        self._in_flight: deque[Row] = deque()
        in_step, is_dry = self._policy.in_step, self.settings.dry_run
        self._in_step = InStep(in_step, self._gradients, lambda: self._parameters, is_dry=is_dry)
        stop, begin = partial(_stop, weakref.ref(self)), self._in_step.decider.begin
        self._between = BetweenSteps(model, optimizers, self._policy, self.monitor, stop=stop, begin=begin)
        self._acts_in_step = bool(self._in_step)
        self._logbook = Logbook()
        self._is_compiled = is_compiled(model)
        if self._upcoming % self.settings.stats_every == 0:
            self._activations.arm()
        self._uses: Uses | None = None
        self._is_first_row = True
        self._backward_since_step = self._stepped_in_backward = self.has_stepped = False
        self._is_set_up = True
        self._between.start(self.run_dir, is_dry=is_dry)

    def _put_right(self) -> None:
        """A hook failed: undo what it may have begun, and watch gradients no longer."""
        self._undo_all()
        self.pending.clear()

    def _after_backward(self) -> None:
        """The gradients of this backward pass are complete."""
        self._backward_since_step = not self._stepped_in_backward
        self._stepped_in_backward = False
        self.pending.measure()
        running = self._running_closure
        if running is not None and self._row is not None:
            # The first evaluation is the gradient of the step; others are a line search.
            running.evaluations += 1
            is_first = running.evaluations == 1
            reading = self.pending.read(running.optimizer, running.held, sample=self._row.is_sampled and is_first)
            self._use(running, self._row, reading, is_recorded=is_first)

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An optimizer is about to step; returns its arguments anew when there is a closure among them."""
        self.has_stepped = True
        held = self._holders.of(optimizer)
        if held is None:
            return None
        if (key := id(optimizer)) in self._steps:
            if is_nested(optimizer):
                self._steps[key].nested += 1
                return None
            self._undo(key)  # of a step that raised
        row = self._row_of(optimizer, held)
        self._between.stepping(optimizer, row)
        self._stepped_in_backward = in_backward()
        closure = closure_of(args, kwargs)
        step = self._steps[key] = Step(optimizer, held)
        if self._policy.state.lr_factor != 1.0 and not self.settings.dry_run:
            step.undo.append(ScaledLR(optimizer, self._policy.state.lr_factor).undo)
        if row.is_sampled:
            turn = row.number // self.settings.stats_every
            step.updates = self.faults.call("statistics", held.updates.start, turn, default=None)
        if closure is None:
            self._use_pending(step, row)
            return None
        self._running_closure = step
        step.counters = KeptCounters(optimizer) if self._in_step.can_skip else None
        return telling(args, kwargs, partial(self._evaluated, step, row), self.safely.failed)

    def _evaluated(self, step: Step, row: Row) -> None:
        if not step.evaluations:  # the closure runs no backward pass of its own
            step.evaluations = 1
            self.safely(self._use_pending, step, row)

    def _use_pending(self, step: Step, row: Row) -> None:
        reading = self.pending.read(step.optimizer, step.held, sample=row.is_sampled)
        self._use(step, row, reading, is_recorded=True)

    def _gain_parameter(self, parameter: nn.Parameter, place: int) -> None:
        """An optimizer turned out to hold a parameter that has no column yet."""
        self.pending.grow()
        self._backward.add([place])
        if self._row is not None:
            self._row.widen(place + 1)
        self._gain(outsider(f"added.{place}", parameter, depth=1 + max(p.depth for p in self._parameters)))

    def _row_of(self, optimizer: Optimizer, held: Held) -> Row:
        """The row that this optimizer's step belongs to; closes the one before when it has its step already."""
        if self._row is not None and held.number in self._row.stepped:
            self._close_open_row()
        self._backward_since_step = False
        self._logbook.stepping()
        if self._row is None:
            number = self._upcoming
            is_sampled = number % self.settings.stats_every == 0
            self._row = Row(number, len(self._gradients.parameters), is_sampled=is_sampled)
        self._row.put_optimizer(held.number, optimizer)
        return self._row

    def _use(self, step: Step, row: Row, reading: Reading, *, is_recorded: bool) -> None:
        """Put the gradients that an optimizer is about to use into the row, and run the in-step actions."""
        found_inf = getattr(step.optimizer, "found_inf", None)
        if found_inf is not None:
            found_inf = host_or_copy(found_inf)
        if self._acts_in_step:
            coefficient = self.faults.call("in-step actions", self._in_step.act, step, row, reading, default=1.0)
            reading.coefficient = reading.coefficient * coefficient
        if is_recorded:
            self._put_reading(row, step.held, reading)
            if found_inf is not None:
                row.put_skip(found_inf, 0.0, reason="grad_scaler")

    def _put_reading(self, row: Row, held: Held, reading: Reading) -> None:
        row.put_norms(held, reading.norms)
        row.put_coefficient(reading.coefficient)
        if reading.stage != "pre_clip":
            row.stage = reading.stage
        if reading.extremes is not None:
            row.put_statistics(GRADIENT_STATISTICS, held.places, reading.extremes)

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An optimizer has stepped."""
        step = self._steps.get(id(optimizer))
        if step is None or self._row is None:
            return
        if step.nested:
            step.nested -= 1
            return
        self._undo(id(optimizer))
        self._backward_since_step = False  # those of a closure belong to this step
        if step.updates is not None and not self._row.skip_reason:
            self.faults.call("statistics", self._put_updates, step.updates, self._row, default=None)
        self.pending.forget(step.held)
        self._between.stepped(self._row)
        if self._modules:
            self.faults.call("activations", self._put_activations, self._row, default=None)

    def _put_activations(self, row: Row) -> None:
        is_next_sampled = (row.number + 1) % self.settings.stats_every == 0
        is_last = len(row.stepped) >= len(self._holders)
        measured = self._activations.turn(is_sampled=row.is_sampled, is_next_sampled=is_next_sampled, is_last=is_last)
        if measured is not None:
            row.put(measured, lambda values: row.merge(by_statistic(values, len(self._modules))))

    def _put_updates(self, updates: Finish, row: Row) -> None:
        places, measured = updates()
        row.put(measured, lambda norms: row.merge(update_statistics(places, norms, row.width)))

    def _undo(self, key: int) -> None:
        step = self._steps.get(key)
        if step is None:
            return
        if step is self._running_closure:
            self._running_closure = None
        for undo in reversed(step.undo):
            undo()
        del self._steps[key]

    def _undo_all(self) -> None:
        self.faults.let_go("undo", *(partial(self._undo, key) for key in list(self._steps)))

    def _close_open_row(self, *, is_last: bool = False) -> None:
        row, self._row = self._row, None
        if row is None:
            return
        for name, value in self._logbook.take(is_last=is_last).items():
            row.put_metric(name, value)
        before, self._hook_seconds = self._hook_seconds, self.safely.seconds
        row.metrics["hook_time"] = self._hook_seconds - before
        if self._is_first_row:
            self._is_first_row = False
            self._learn()
        self._backward.thin()
        if not row.send() and not self._in_flight:
            self._record(row)
            return
        self._in_flight.append(row)
        while self._in_flight and (self._in_flight[0].is_here or is_last or len(self._in_flight) > LAG):
            self._record(self._in_flight.popleft())

    def _learn(self) -> None:
        """What the first step showed of the model: order of use, activations in functional form."""
        parameters = list(self._parameters)
        if self._uses:
            parameters = with_uses(parameters, self._uses)
        if not self._is_compiled:  # a compiled backward hands over its gradients in no telling order
            parameters = by_execution(parameters, self._backward.arrivals)
        if parameters != list(self._parameters):
            self._redescribe(parameters)

    def _record(self, row: Row) -> None:
        row.receive()
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
        self._between.take(due, self._next_step + self._waiting)

    def _log(self, numbers: Mapping[str, Any]) -> None:
        """Numbers logged between backward and step belong to that step.

        Tensors on an accelerator are copied there; nobody waits for them.
        """
        checked = {name: logged_number(name, value) for name, value in numbers.items()}
        if self._is_first_row and self._uses is None:
            self.faults.call("graph", self._read_graph, numbers.get("loss"), default=None)
        is_ahead = self._backward_since_step and not self._steps
        running = self._running_closure
        self._logbook.add(
            checked,
            is_first=self._row is None and self._is_first_row,
            is_ahead=is_ahead,
            is_repeated=running is not None and running.evaluations > 1,
        )

    def _read_graph(self, loss: Any) -> None:
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            self._uses = read_graph(loss.grad_fn, self._holders.place)

    def mark(self, text: str) -> None:
        """See `Watcher.mark`."""
        self._require_open()
        self.monitor.mark(text, self._next_step + self._waiting)

    def clipping(self, parameters: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> None:
        """The user's loop is about to scale gradients, by `clip_grad_norm_` or its kin."""
        places = self._holders.places(parameters)
        self.pending.is_announced = bool(places)
        if not places:
            return
        total_norm = whole(total_norm)
        self.pending.before_clip(places, max_norm, total_norm, sample=self._is_sampled_next())
        if self._row is not None and self._running_closure is not None:
            # Within a closure the row has its gradients already, and not yet what they are multiplied by.
            self._row.put_coefficient(host_or_copy((max_norm / (total_norm + EPSILON)).clamp(max=1.0)))
        if max_norm == math.inf and on_host(total_norm) and not math.isfinite(float(total_norm)):
            text = f"clip_grad_norm_(max_norm=inf) at norm {float(total_norm)} turns every gradient into NaN"
            self.monitor.mark(text, self._upcoming)

    def _is_sampled_next(self) -> bool:
        """Whether the next optimizer to step may step in a row that is sampled."""
        row = self._row
        if row is not None and row.is_sampled and len(row.stepped) < len(self._holders):
            return True
        return self._upcoming % self.settings.stats_every == 0

    @property
    def _waiting(self) -> int:
        """Rows that are closed and not recorded yet."""
        return len(self._in_flight)

    @property
    def _upcoming(self) -> int:
        """Number of the row that the next step opens."""
        return self._next_step + self._waiting + (self._row is not None)

    def unscaling(self, optimizer: Optimizer, scale: Tensor) -> None:
        """A GradScaler is about to divide the gradients of an optimizer by its scale."""
        held = self._holders.of(optimizer)
        self.pending.is_announced = held is not None
        if held is not None:
            self.pending.before_unscale(held, scale)

    def scaled(self, optimizer: Optimizer, scale: Tensor) -> None:
        """A GradScaler has stepped an optimizer or, having found an overflow, left its step out."""
        held = self._holders.of(optimizer)
        row = self._row if self.has_stepped or held is None else self._row_of(optimizer, held)
        if held is None or row is None:
            return
        if not self.has_stepped:
            self._put_reading(row, held, self.pending.read(optimizer, held, sample=row.is_sampled))
            row.skip_reason = "grad_scaler"
            self.pending.forget(held)
        row.put_metric("grad_scale", host_or_copy(scale))

    def state_dict(self) -> dict[str, Any]:
        """See `Watcher.state_dict`; the step in progress is complete with it."""
        self.faults.call("torch hooks", partial(self._close_open_row, is_last=True), default=None)
        return {**super().state_dict(), "in_step": self._in_step.decider.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        """See `Watcher.load_state_dict`."""
        super().load_state_dict(state)
        self._in_step.decider.load_state_dict(state.get("in_step", ()))

    def _endings(self, status: str) -> list[Callable[[], object]]:
        if not self._is_set_up:
            return [self._backward.remove] if hasattr(self, "_backward") else []
        last_row = partial(self.faults.call, "torch hooks", self._close_open_row, is_last=True, default=None)
        parts: list[Callable[[], object]] = [self._detach, self._between.close, self._backward.remove]
        parts += [self._activations.disarm, self._undo_all, last_row, self.pending.clear]
        return [*parts, partial(self._finish, status)]

    def _finish(self, status: str) -> None:
        """Nothing more is measured."""


def _stop(reference: weakref.ref[TorchWatcher], words: str) -> None:
    if (watcher := reference()) is not None:
        watcher.on_stop(words)
