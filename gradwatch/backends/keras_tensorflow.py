"""The tap in a TensorFlow step: rows go to a ring on the device, in a variable that belongs to nobody but us."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gradwatch.backends.keras_model import Columns
from gradwatch.backends.keras_rule import EXTRAS, Gradients, Verdict, base_of, gather, is_loss_scaled
from gradwatch.backends.keras_samples import Sampler
from gradwatch.backends.keras_tap import Tap, no_rows
from gradwatch.faults import Faults
from gradwatch.records import NOT_MEASURED, Floats

Tensor = Any


class TensorFlowTap(Tap):
    """See `Tap`; works in eager steps, graphs, XLA and under `MirroredStrategy`.

    Args:
        rule: See `Tap`.
        scales_lr: See `Tap`.
        faults: See `Tap`.
        rows: Rows that the ring holds; more of them between two calls of `drain` are lost.
        prepare: Called in the first trace, when the model is built, if `start` was not called before.
        sampler: See `Tap`.
    """

    def __init__(
        self,
        rule: Any,
        *,
        scales_lr: bool,
        faults: Faults,
        rows: int,
        prepare: Callable[[], None],
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__(rule, scales_lr=scales_lr, faults=faults, sampler=sampler)
        self._is_sampling = False
        self._rows, self._prepare = rows, prepare
        self._strategy: Any = None
        self._ring: Any = None
        self._cursor: Any = None
        self._factor: Any = None
        self._sampling: Any = None
        self._sample: Any = None
        self._state: dict[int, list[Any]] = {}
        self._updates: dict[tuple[int, ...], _Updates] = {}
        self._read = 0
        self._seen = threading.local()  # each replica is traced in a thread of its own
        self.lost = 0

    def start(self, columns: Columns, optimizers: Sequence[Any]) -> None:
        super().start(columns, optimizers)
        strategies = [base_of(optimizer)._distribution_strategy for optimizer in optimizers]
        self._strategy = next((each for each in strategies if each.num_replicas_in_sync > 1), None)
        self._ring = self._variable(np.zeros((self._rows, len(columns) + len(EXTRAS)), np.float32))
        self._cursor = self._variable(np.int64(0))
        if self.rule.actions:
            for number in range(len(optimizers)):
                self._state[number] = [self._variable(value) for value in self.rule.initial_state()]
        if self.scales_lr:
            self._factor = self._variable(np.float32(1.0), each_replica=False)
        if self.sampler is not None:
            self._sampling = self._variable(np.bool_(self._is_sampling), each_replica=False)
            self._sample = self._variable(np.full(self.sampler.size(self.width), NOT_MEASURED, np.float32))

    def _variable(self, value: Any, *, each_replica: bool = True) -> Any:
        """A variable outside the model; each replica has its own copy and the first one is read."""
        kind = {"aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA, "trainable": False}
        if each_replica:
            kind["synchronization"] = tf.VariableSynchronization.ON_READ
        with tf.init_scope(), self._strategy.scope() if self._strategy is not None else nullcontext():
            return tf.Variable(value, **kind)

    def lr_factor(self) -> Tensor:
        return self._factor

    def set_lr_factor(self, factor: float) -> None:
        if self._factor is not None:
            self._factor.assign(factor)

    def set_sampling(self, wanted: bool) -> None:
        if wanted != self._is_sampling:
            self._is_sampling = wanted
            if self._sampling is not None:
                self._sampling.assign(wanted)

    def sample(self) -> Tensor:
        return self._sample.read_value()

    def reset(self) -> None:
        if self._cursor is not None:
            self._read = int(self._cursor.numpy())
        self.set_lr_factor(1.0)
        self.begin_anew()

    def begin_anew(self) -> None:
        for variables in self._state.values():
            for variable, value in zip(variables, self.rule.initial_state(), strict=True):
                variable.assign(value)

    def drain(self, *, lag: int = 0) -> Floats:
        if self._cursor is None:
            return no_rows(0)
        end = int(self._cursor.numpy())
        if end == self._read:
            return no_rows(self.width)
        first = max(self._read, end - self._rows)
        self.lost += first - self._read
        self._read = end
        rows: Floats = self._ring.numpy()[np.arange(first, end) % self._rows]
        return rows

    def norms(self, grads: Sequence[Tensor]) -> Tensor:
        squares = [tf.nn.l2_loss(tf.cast(_values(grad), tf.float32)) for grad in grads]
        return tf.sqrt(2.0 * tf.stack(squares)) if squares else tf.zeros([0])

    def multiply(self, grad: Any, scale: Tensor) -> Any:
        return _on_values(grad, lambda t: tf.cast(tf.cast(t, tf.float32) * tf.cast(scale, tf.float32), t.dtype))

    def limit(self, grad: Any, limit: Tensor) -> Any:
        most = tf.cast(limit, grad.dtype)
        return _on_values(grad, lambda t: tf.clip_by_value(t, -most, most))

    def by_unit(self, grad: Any, weight: Any, scale_of: Any) -> Any:
        if not isinstance(grad, tf.IndexedSlices):
            return super().by_unit(grad, weight, scale_of)
        grad = _summed(grad)
        rows = tf.gather(tf.convert_to_tensor(weight), grad.indices)
        scale = scale_of(tf.norm(grad.values, axis=-1, keepdims=True), tf.norm(rows, axis=-1, keepdims=True))
        return tf.IndexedSlices(grad.values * scale, grad.indices, grad.dense_shape)

    def copies(self, values: Sequence[Tensor]) -> Any:
        key = tuple(map(id, values))
        if key not in self._updates:
            self._updates[key] = _Updates(list(values))
        updates = self._updates[key]
        return updates, updates.copy()

    def changes(self, before: Any, after: Sequence[Tensor]) -> Tensor:
        updates, copy = before
        return updates.norms(copy)

    def _replacements(self, number: int, optimizer: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        yield from super()._replacements(number, optimizer)
        base, scale_loss = base_of(optimizer), optimizer.scale_loss

        def note_loss(loss: Tensor) -> Tensor:
            self._seen.loss = loss
            return scale_loss(loss)

        yield optimizer, "scale_loss", note_loss
        if self._reduces_first(optimizer):
            yield base, "_all_reduce_sum_gradients", list  # the entry point has reduced them already

    def _entry(self, number: int, optimizer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def apply(grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None) -> Any:
            variables = optimizer._trainable_variables if trainable_variables is None else list(trainable_variables)
            grads = list(grads)
            if not grads or len(grads) != len(variables) or not self._is_ready(optimizer, variables):
                return original(grads, trainable_variables)
            if self.on_step is not None and tf.executing_eagerly():
                self.on_step(number)
            loss = self._loss()
            summed, loss = self._reduce(grads, loss)
            measured = (number, optimizer, summed, variables, loss)
            ours = self.faults.call("keras tap", self._measure, *measured, default=None)
            if self._reduces_first(optimizer):
                grads = summed
            if ours is None:
                return original(grads, trainable_variables)
            new, skip, empty = ours
            return self._apply(original, new if self.rule.acts else grads, variables, skip=skip, empty=empty)

        return apply

    def _is_ready(self, optimizer: Any, variables: Sequence[Any]) -> bool:
        """Learn the model in the first trace; make an optimizer's variables before a condition needs them."""
        if self.columns is None:
            with tf.init_scope():  # the host's part, though a graph is being traced
                self._prepare()
        if not optimizer.built and (self.rule.acts or is_loss_scaled(optimizer)):
            with keras.name_scope(optimizer.name, caller=optimizer):
                optimizer.build(variables)
            optimizer.built = True
        return self.columns is not None

    def _loss(self) -> Tensor | None:
        """The loss of this step, if it was seen and is not a tensor of another function's graph."""
        loss, self._seen.loss = getattr(self._seen, "loss", None), None
        return loss if _is_here(loss) else None

    def _reduces_first(self, optimizer: Any) -> bool:
        """Whether the replicas' gradients are summed before the optimizer's entry point, instead of inside.

        While we only watch, that must give what the optimizer would get itself: what it clips or divides, it does
        before summing. Then we sum for ourselves, once more.
        """
        base = base_of(optimizer)
        own = (base.clipnorm, base.global_clipnorm, base.clipvalue, base.loss_scale_factor)
        as_inside = base is optimizer and all(value is None for value in own)
        return self._strategy is not None and (self.rule.acts or as_inside)

    def _reduce(self, grads: list[Tensor | None], loss: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
        """The sum over replicas; also of the loss, of which each has its share."""
        if self._strategy is None:
            return grads, loss
        present = [grad for grad in grads if grad is not None]
        present += [] if loss is None else [tf.convert_to_tensor(loss)]
        summed = list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, present))
        loss = None if loss is None else summed.pop()
        return [None if grad is None else summed.pop(0) for grad in grads], loss

    def _measure(
        self, number: int, optimizer: Any, grads: list[Tensor | None], variables: Sequence[Any], loss: Tensor | None
    ) -> Any:
        assert self.columns is not None
        gradients = gather(optimizer, grads, variables, self.columns.of, value_of=tf.convert_to_tensor)
        state = self._state.get(number, [])
        given: dict[str, Any] = {"grads": grads, "weights": variables, "lr": self._rate(optimizer), "loss": loss}
        given["state"] = [variable.read_value() for variable in state]
        current, verdict, skip = self.measure(number, optimizer, gradients, **given)
        self._push(current)
        self.faults.call("keras sample", self._sample_if_wanted, gradients, default=None)
        if verdict is None:
            return grads, None, None
        for variable, value in zip(state, verdict.state, strict=True):
            variable.assign(value)
        if not self.rule.acts:
            return grads, None, None
        return verdict.edited, skip, self._emptier(optimizer, gradients, verdict)

    def _sample_if_wanted(self, gradients: Gradients) -> None:
        if self.sampler is None:
            return
        sampler, sizes = self.sampler, self.sizes()
        outputs, sampler.outputs = {k: v for k, v in sampler.outputs.items() if _is_here(v)}, {}

        def measured() -> Tensor:
            new = sampler.measure(gradients, [_values(grad) for grad in gradients.tensors], sizes, outputs)
            # Optimizers that take turns add to each other's.
            self._sample.assign(tf.where(new == NOT_MEASURED, self._sample.read_value(), new))
            return tf.constant(0)

        _run_if(self._sampling, measured)

    def _rate(self, optimizer: Any) -> Tensor:
        rate = self.learning_rate(optimizer)
        return rate if isinstance(rate, float) else tf.convert_to_tensor(rate)

    def _push(self, values: Tensor) -> None:
        place = tf.reshape(self._cursor.read_value() % self._rows, [1, 1])
        self._ring.assign(tf.tensor_scatter_nd_update(self._ring.read_value(), place, values[None]))
        self._cursor.assign_add(1)

    @staticmethod
    def _emptier(optimizer: Any, gradients: Any, verdict: Verdict) -> Callable[[], None] | None:
        """Empties the accumulators at an update; and when it is skipped, takes the step count back to before them."""
        if gradients.is_update is None:
            return None
        base = base_of(optimizer)

        def empty() -> None:
            for accumulator in gradients.accumulators:
                held = tf.convert_to_tensor(accumulator)
                accumulator.assign(tf.where(gradients.is_update, tf.zeros_like(held), held))
            if verdict.skip is not None:
                back = tf.where(verdict.skip, base.gradient_accumulation_steps - 1, 0)
                base._iterations.assign_sub(tf.cast(back, base._iterations.dtype))

        return empty

    def _apply(
        self,
        original: Callable[..., Any],
        grads: Sequence[Tensor | None],
        variables: Sequence[Any],
        *,
        skip: Tensor | None,
        empty: Callable[[], None] | None,
    ) -> Any:
        if empty is not None:
            empty()
        if skip is None:
            return original(grads, variables)
        if self._strategy is None:
            return tf.cond(skip, lambda: tf.constant(0), lambda: _done(original(grads, variables)))
        context = tf.distribute.get_replica_context()
        return context.merge_call(_apply_across, args=(skip, original, grads, variables))


def _apply_across(strategy: Any, skip: Tensor, original: Any, grads: Any, variables: Any) -> Any:
    # A condition inside a replica must not hold a merge_call, so it stands outside of them; all replicas agree on it.
    each = strategy.extended.call_for_each_replica
    one = strategy.experimental_local_results(skip)[0]
    return tf.cond(one, lambda: tf.constant(0), lambda: _done(each(original, args=(grads, variables))))


def _run_if(wanted: Any, function: Callable[[], Tensor]) -> None:
    """Run a function that returns an int32 scalar, when a boolean variable says so.

    As `tf.cond`, but a graph does nothing for what the function would need when it does not run: the operations that
    `tf.cond` becomes pass each of a hundred gradients through a switch of its own.
    """
    if tf.executing_eagerly():
        if wanted:
            function()
        return
    run = tf.function(function, autograph=False).get_concrete_function()
    needs = [tf.TensorSpec(need.shape, need.dtype) for need in run.captured_inputs]
    rest = tf.function(lambda *_: tf.constant(0), autograph=False).get_concrete_function(*needs)
    tf.raw_ops.If(
        cond=wanted.read_value(), input=run.captured_inputs, Tout=[tf.int32], then_branch=run, else_branch=rest
    )


def _is_here(tensor: Any) -> bool:
    """Whether a tensor is a value, or belongs to the graph that is being traced."""
    graph = None if tf.executing_eagerly() else getattr(tensor, "graph", None)
    return graph is None or graph is tf.compat.v1.get_default_graph()


def _done(result: Any) -> Tensor:
    del result
    return tf.constant(0)


class _Updates:
    """Measures weights and what a step changed in them, by two graphs that hold the variables.

    One flat copy: a hundred tensors to hand over cost more than their norms.

    Args:
        variables: Those of TensorFlow.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._variables = variables
        self._sizes = [math.prod(variable.shape) for variable in variables]
        self.copy = tf.function(self._copy, autograph=False)
        self.norms = tf.function(self._norms, autograph=False)
        for graph in (self.copy, self.norms):
            # Each is traced once; TensorFlow counts those of several models as one that is traced again and again.
            graph._omit_frequent_tracing_warning = True

    def _flat(self) -> list[Tensor]:
        return [tf.reshape(tf.cast(variable, tf.float32), [-1]) for variable in self._variables]

    def _copy(self) -> Tensor:
        return tf.concat(self._flat(), 0)

    def _norms(self, copy: Tensor) -> Tensor:
        pairs = [(now, now - old) for now, old in zip(self._flat(), tf.split(copy, self._sizes), strict=True)]
        return tf.sqrt(2.0 * tf.stack([[tf.nn.l2_loss(part) for part in pair] for pair in pairs], axis=1))


def _summed(grad: Any) -> Any:
    """Sparse gradients with the rows of equal index added up."""
    if not isinstance(grad, tf.IndexedSlices):
        return grad
    rows, place = tf.unique(grad.indices)
    values = tf.math.unsorted_segment_sum(grad.values, place, tf.size(rows))
    return tf.IndexedSlices(values, rows, grad.dense_shape)


def _values(grad: Any) -> Tensor:
    return _summed(grad).values if isinstance(grad, tf.IndexedSlices) else grad


def _on_values(grad: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(grad, tf.IndexedSlices):
        grad = _summed(grad)
        return tf.IndexedSlices(change(grad.values), grad.indices, grad.dense_shape)
    return change(grad)
