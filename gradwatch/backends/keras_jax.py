"""The tap in a JAX step: rows leave the compiled step as one more output, controls enter it as one more input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import keras
import numpy as np
from jax import numpy as jnp
from keras.src.backend.common.stateless_scope import in_stateless_scope  # without a public name

from gradwatch.backends.keras_rule import EXTRAS, Gradients, Verdict, base_of, gather
from gradwatch.backends.keras_samples import Sampler
from gradwatch.backends.keras_tap import Tap, no_rows, replaced
from gradwatch.faults import Faults
from gradwatch.records import Floats

Tensor = Any
_MOST_IN_FLIGHT = 256  # rows kept on the device while nobody drains, as in train_on_batch after a failed fit


class JaxTap(Tap):
    """See `Tap`; works jitted or not, and with `keras.distribution`.

    Args:
        rule: See `Tap`.
        scales_lr: See `Tap`.
        faults: See `Tap`.
        sampler: See `Tap`.
    """

    entry = "stateless_apply"

    def __init__(self, rule: Any, *, scales_lr: bool, faults: Faults, sampler: Sampler | None = None) -> None:
        super().__init__(rule, scales_lr=scales_lr, faults=faults, sampler=sampler)
        self._pending: list[Tensor] = []
        self._factor = np.float32(1.0)
        self._sampling: Any = np.bool_(False)
        self._state: dict[int, list[Any]] = {}
        self._sample: Tensor = None
        # While a step is traced: what it gives out, and what it was given.
        self._rows: list[Tensor] = []
        self._gradients: Gradients | None = None
        self._outputs: dict[int, Tensor] = {}
        self._traced_factor: Tensor = self._factor
        self._traced_state: dict[int, list[Tensor]] = {}

    def lr_factor(self) -> Tensor:
        return self._traced_factor

    def set_lr_factor(self, factor: float) -> None:
        self._factor = np.float32(factor)

    def set_sampling(self, wanted: bool) -> None:
        self._sampling = np.bool_(wanted)

    def sample(self) -> Tensor:
        return self._sample

    def reset(self) -> None:
        self._pending.clear()
        self.set_lr_factor(1.0)
        self.begin_anew()

    def begin_anew(self) -> None:
        self._state = {number: self.rule.initial_state() for number in self._state}

    def start(self, columns: Any, optimizers: Sequence[Any]) -> None:
        super().start(columns, optimizers)
        if self.rule.actions:
            self._state = {number: self.rule.initial_state() for number in range(len(optimizers))}

    def drain(self, *, lag: int = 0) -> Floats:
        ready, self._pending = self._pending[: len(self._pending) - lag], self._pending[len(self._pending) - lag :]
        if not ready:
            return no_rows(self.width if self.columns is not None else 0)
        return np.concatenate([np.asarray(rows) for rows in ready])

    def norms(self, grads: Sequence[Tensor]) -> Tensor:
        return jnp.sqrt(_squares(list(grads))) if grads else jnp.zeros(0)

    def multiply(self, grad: Tensor, scale: Tensor) -> Tensor:
        return (grad.astype(jnp.float32) * scale).astype(grad.dtype)

    def limit(self, grad: Tensor, limit: Tensor) -> Tensor:
        return jnp.clip(grad, -limit, limit).astype(grad.dtype)

    def copies(self, values: Sequence[Tensor]) -> Any:
        copies: list[Tensor] = _copied(list(values))  # the step that follows deletes the originals
        return copies

    def changes(self, before: Any, after: Sequence[Tensor]) -> Tensor:
        return _change_norms(list(before), list(after))

    @contextmanager
    def stepping(self, model: keras.Model) -> Iterator[None]:
        """While this holds, `model.make_train_function` builds a step with our output and input."""
        step, make = model.train_step, model._make_function

        def train_step(state: Any, packed: Any) -> Any:
            data, self._traced_factor, traced_state, wanted = packed
            self._rows, self._traced_state = [], dict(traced_state)
            self._gradients, self._outputs = None, {}
            logs, state = step(state, data)
            width = self.width + len(EXTRAS)
            rows = jnp.stack(self._rows) if self._rows else jnp.zeros((0, width), jnp.float32)
            sample = self.faults.call("keras sample", self._sampled, wanted, default=None)
            return (logs, rows, self._traced_state, sample), state

        def make_function(function: Any, concatenate_outputs: bool = False) -> Any:
            return make(self._host(function), concatenate_outputs)

        with replaced([(model, "train_step", train_step), (model, "_make_function", make_function)]):
            yield

    def replacements(self, model: Any, optimizers: Sequence[Any]) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        yield from super().replacements(model, optimizers)
        update = getattr(model, "_update_metrics_variables", None)
        if update is None:
            return
        measures_outputs = self.sampler is not None and bool(self.sampler.layers)

        def note_loss(metrics: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            # The loss is told after the optimizer was called: put it into the rows of this step.
            if measures_outputs:
                *metrics, self._outputs = metrics
            place = self.width + EXTRAS.index("loss")
            self._rows = [row.at[place].set(jnp.asarray(loss, row.dtype)) for row in self._rows]
            return update(metrics, loss, *args, **kwargs)

        yield model, "_update_metrics_variables", note_loss
        if measures_outputs:
            yield model, "compute_loss_and_updates", self._with_outputs(model.compute_loss_and_updates)

    def _with_outputs(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Hands outputs of layers out of the function that JAX differentiates, behind the metrics."""

        def compute(*args: Any, **kwargs: Any) -> Any:
            assert self.sampler is not None
            self.sampler.outputs = {}
            loss, (unscaled, predicted, others, metrics) = original(*args, **kwargs)
            outputs, self.sampler.outputs = self.sampler.outputs, {}
            return loss, (unscaled, predicted, others, [*metrics, outputs])

        return compute

    def _sampled(self, wanted: Tensor) -> Tensor:
        """The vector of the step at hand where it is wanted, else one of no meaning."""
        if self.sampler is None or self._gradients is None:
            return None
        sampler, gradients, sizes = self.sampler, self._gradients, self.sizes()
        given = (gradients.tensors, self._outputs, gradients.factor)

        def measured(tensors: Any, outputs: Any, factor: Any) -> Tensor:
            return sampler.measure(dataclasses.replace(gradients, factor=factor), tensors, sizes, outputs)

        def nothing(*_: Any) -> Tensor:
            return jnp.zeros(sampler.size(len(sizes)), jnp.float32)

        if isinstance(wanted, jax.core.Tracer):
            return jax.lax.cond(wanted, measured, nothing, *given)
        if not wanted:
            return np.zeros(0, np.float32)
        # What JAX runs op by op it would compile op by op.
        tensors, outputs, factor = jax.tree.map(np.asarray, given)
        found = dataclasses.replace(gradients, factor=factor)
        return sampler.measure(found, tensors, sizes, outputs, xp=np)

    def loop_state(self, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a loop of the user's own hands to its next step."""
        row = np.zeros(self.width + len(EXTRAS), np.float32) if state is None else state["row"]
        return {"row": row, "lr_factor": self._factor, "actions": self._state if state is None else state["actions"]}

    def keep(self, state: dict[str, Any]) -> None:
        """Keep the row of a step of the user's own loop."""
        self._pending.append(state["row"][None])

    @contextmanager
    def lent(self, state: dict[str, Any]) -> Iterator[Callable[[], dict[str, Any]]]:
        """While this holds, the entry point works on the state of the user's loop; gives its new state in the end."""
        self._rows, self._traced_factor, self._traced_state = [], state["lr_factor"], dict(state["actions"])

        def after() -> dict[str, Any]:
            row = self._rows[-1] if self._rows else state["row"]
            return {"row": row, "lr_factor": state["lr_factor"], "actions": self._traced_state}

        yield after

    def eagerly(self, optimizers: Sequence[Any]) -> AbstractContextManager[None]:
        """Sits on `apply` of the optimizers until the block ends, for loops that call it op by op."""
        return replaced((each, "apply", self._eager(n, each, each.apply)) for n, each in enumerate(optimizers))

    def _eager(self, number: int, optimizer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def apply(grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None) -> Any:
            grads = list(grads)
            if in_stateless_scope() or any(isinstance(grad, jax.core.Tracer) for grad in grads):
                return original(grads, trainable_variables)  # called by `stateless_apply`
            if self.on_step is not None:
                self.on_step(number)
            variables = list(optimizer._trainable_variables if trainable_variables is None else trainable_variables)
            ours = self.faults.call(
                "keras tap", self._measure_eagerly, number, optimizer, grads, variables, default=None
            )
            new, is_skipped = ours or (grads, False)
            if is_skipped:
                return None
            with replaced(self._rate_replacements(optimizer)):
                return original(new, variables)

        return apply

    def _measure_eagerly(
        self, number: int, optimizer: Any, grads: list[Tensor | None], variables: Sequence[Any]
    ) -> tuple[list[Tensor | None], bool]:
        place = {id(variable): i for i, variable in enumerate(optimizer._trainable_variables)}
        whole: list[Tensor | None] = [None] * len(place)
        for variable, grad in zip(variables, grads, strict=True):
            whole[place[id(variable)]] = grad
        held, weights = ([v.value for v in kept] for kept in (optimizer.variables, optimizer._trainable_variables))
        self._rows, self._traced_factor, self._traced_state = [], self._factor, self._state
        new, skip, after_skip, before_update = self._measure(number, optimizer, held, whole, weights)
        self._pending.append(self._rows[-1][None])
        is_skipped = skip is not None and bool(skip)
        for variable, old, value in zip(
            optimizer.variables, held, after_skip if is_skipped else before_update, strict=True
        ):
            if value is not old:
                variable.assign(value)
        return [new[place[id(variable)]] for variable in variables], is_skipped

    before_step: Callable[[Any], Any] = staticmethod(lambda state: state)
    after_step: Callable[[Any, Any], None] = staticmethod(lambda state, logs: None)

    def _host(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Round the compiled step, on the host: hands over controls, keeps rows."""

        def step(state: Any, data: Any) -> Any:
            state = self.before_step(state)
            packed = (data, self._factor, self._state, self._sampling)
            (logs, rows, self._state, self._sample), state = function(state, packed)
            self._pending.append(rows)
            del self._pending[:-_MOST_IN_FLIGHT]
            self.after_step(state, logs)
            return logs, state

        return step

    def _entry(self, number: int, optimizer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def stateless_apply(optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
            given = (number, optimizer, optimizer_variables, list(grads), trainable_variables)
            ours = self.faults.call("keras tap", self._measure, *given, default=None) if self.columns else None
            if ours is None:
                return original(optimizer_variables, grads, trainable_variables)
            new, skip, skipped_variables, applied_variables = ours

            def taken() -> Any:
                return original(applied_variables, new, trainable_variables)

            if skip is None:
                return taken()
            if not isinstance(skip, jax.core.Tracer):
                return (trainable_variables, skipped_variables) if bool(skip) else taken()
            return jax.lax.cond(skip, lambda: (list(trainable_variables), list(skipped_variables)), taken)

        return stateless_apply

    def _measure(
        self, number: int, optimizer: Any, held: Sequence[Tensor], grads: list[Tensor | None], weights: Sequence[Tensor]
    ) -> Any:
        assert self.columns is not None
        values = {id(variable): value for variable, value in zip(optimizer.variables, held, strict=True)}

        def value_of(variable: Any) -> Tensor:
            return values.get(id(variable), variable)

        gradients = gather(optimizer, grads, optimizer._trainable_variables, self.columns.of, value_of=value_of)
        with keras.StatelessScope(state_mapping=list(zip(optimizer.variables, held, strict=True))):
            rate = self.learning_rate(optimizer)
            lr = rate if isinstance(rate, float) else jnp.asarray(rate.value if hasattr(rate, "value") else rate)
        state = self._traced_state.get(number, [])
        given: dict[str, Any] = {"grads": grads, "weights": weights, "state": state, "lr": lr, "loss": None}
        current, verdict, skip = self.measure(number, optimizer, gradients, **given)
        self._rows.append(current)
        self._gradients = gradients
        if verdict is None:
            return grads, None, held, held
        self._traced_state[number] = verdict.state
        if not self.rule.acts:
            return grads, None, held, held
        return verdict.edited, skip, *self._emptied(optimizer, held, gradients, verdict)

    @staticmethod
    def _emptied(optimizer: Any, held: Sequence[Tensor], gradients: Gradients, verdict: Verdict) -> tuple[Any, Any]:
        """The optimizer's variables after a skipped update, and those to apply an update to."""
        if gradients.is_update is None:
            return held, held
        emptied = {id(accumulator) for accumulator in gradients.accumulators}
        applied = [
            jnp.where(gradients.is_update, 0, value).astype(value.dtype) if id(variable) in emptied else value
            for variable, value in zip(optimizer.variables, held, strict=True)
        ]
        base = base_of(optimizer)
        skipped = [
            value - (base.gradient_accumulation_steps - 1) if variable is base._iterations else value
            for variable, value in zip(optimizer.variables, applied, strict=True)
        ]
        return skipped, applied


@jax.jit
def _squares(grads: list[Tensor]) -> Tensor:
    # Faster in the middle of a compiled step than `vdot`, and as exact.
    return jnp.stack([jnp.sum(jnp.square(grad.astype(jnp.float32))) for grad in grads])


@jax.jit
def _copied(values: list[Tensor]) -> list[Tensor]:
    return [jnp.copy(value) for value in values]


@jax.jit
def _change_norms(before: list[Tensor], after: list[Tensor]) -> Tensor:
    return jnp.sqrt(jnp.stack([_squares(after), _squares([a - b for b, a in zip(before, after, strict=True)])]))
