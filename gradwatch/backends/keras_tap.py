"""Where gradwatch sits in a Keras step: round the entry point of each optimizer, only while the step runs.

Nothing is added to the model's or the optimizer's variables, so that saving, loading and cloning work as ever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar

import keras
import numpy as np

from gradwatch.backends.keras_model import Columns
from gradwatch.backends.keras_rule import EXTRAS, Gradients, Rule, Verdict, base_of, edited, is_loss_scaled, row
from gradwatch.backends.keras_samples import Sampler
from gradwatch.faults import Faults
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, Floats

Tensor = Any


class Tap(ABC):
    """Measures and edits the gradients that optimizers of one model are given.

    Args:
        rule: The in-step actions.
        scales_lr: Whether the learning rate may be scaled later; compiled in only when asked for.
        faults: Keeps failures of the measurement out of the training.
        sampler: Measures the dearer statistics in the steps for which `set_sampling` asks; None for none.
    """

    #: Name of the optimizer's method that gradients pass through.
    entry: ClassVar[str] = "apply"

    def __init__(self, rule: Rule, *, scales_lr: bool, faults: Faults, sampler: Sampler | None = None) -> None:
        self.rule, self.scales_lr, self.faults, self.sampler = rule, scales_lr, faults, sampler
        self.columns: Columns | None = None
        #: Called with an optimizer's number before it steps, wherever Python runs at that moment: not in a graph.
        self.on_step: Callable[[int], None] | None = None
        self.optimizers: list[Any] = []

    def start(self, columns: Columns, optimizers: Sequence[Any]) -> None:
        """Take the model as it is once it is built; called once, before the first gradient is measured."""
        self.columns, self.optimizers = columns, list(optimizers)

    @property
    def width(self) -> int:
        """Number of columns."""
        assert self.columns is not None
        return len(self.columns)

    def column_of(self, variable: Any) -> int:
        """The column of a variable of the model."""
        column = self.columns.of(variable) if self.columns is not None else None
        assert column is not None
        return column

    def attached(self, model: Any, optimizers: Sequence[Any]) -> AbstractContextManager[None]:
        """Sits on the optimizers, as attributes of the instances, until the block ends."""
        return replaced(self.replacements(model, optimizers))

    def replacements(self, model: Any, optimizers: Sequence[Any]) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        """Objects, names of their methods, and what stands in for these."""
        for number, optimizer in enumerate(optimizers):
            yield from self._replacements(number, optimizer)
        if self.sampler is not None:
            yield from self.sampler.replacements()

    def _replacements(self, number: int, optimizer: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        yield optimizer, self.entry, self._entry(number, optimizer, getattr(optimizer, self.entry))
        yield from self._rate_replacements(optimizer)

    def _rate_replacements(self, optimizer: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        base = base_of(optimizer)
        if self.scales_lr:
            current = base._get_current_learning_rate
            factor = partial(self.faults.call, "keras rate", self.lr_factor, default=1.0)
            yield base, "_get_current_learning_rate", lambda: current() * factor()

    @abstractmethod
    def _entry(self, number: int, optimizer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for the optimizer's entry point."""

    @abstractmethod
    def lr_factor(self) -> Tensor:
        """Gradwatch's factor on the learning rate, inside the step."""

    @abstractmethod
    def set_lr_factor(self, factor: float) -> None:
        """Change the factor from the next step on."""

    @abstractmethod
    def set_sampling(self, wanted: bool) -> None:
        """Whether steps from now on are sampled."""

    @abstractmethod
    def sample(self) -> Tensor:
        """What the last sampled step measured, for `Sampler.taken_apart`; left on the device."""

    @abstractmethod
    def reset(self) -> None:
        """Forget rows and what actions remember: a new run begins."""

    @abstractmethod
    def begin_anew(self) -> None:
        """Let the in-step actions learn anew what is usual: norms of other weights say nothing about those to come."""

    @abstractmethod
    def drain(self, *, lag: int = 0) -> Floats:
        """The rows written since the last call, float32 of shape (k, width + len(EXTRAS)).

        Args:
            lag: Leave this many of the newest calls' rows where waiting for them would stall the device.
        """

    @abstractmethod
    def norms(self, grads: Sequence[Tensor]) -> Tensor:
        """L2 norms in float32, shape (n,)."""

    @abstractmethod
    def multiply(self, grad: Tensor, scale: Tensor) -> Tensor:
        """A gradient times a factor that broadcasts to it."""

    @abstractmethod
    def limit(self, grad: Tensor, limit: Tensor) -> Tensor:
        """A gradient with its elements kept in [-limit, limit]."""

    def by_unit(self, grad: Tensor, weight: Tensor, scale_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A gradient scaled unit by unit; a unit makes one output, which is the last axis of a Keras kernel."""
        norms = [_unit_norms(keras.ops.convert_to_tensor(tensor)) for tensor in (grad, weight)]
        return self.multiply(grad, scale_of(*norms))

    @abstractmethod
    def copies(self, values: Sequence[Tensor]) -> Any:
        """What `changes` needs of the weights before a step changes them."""

    @abstractmethod
    def changes(self, before: Any, after: Sequence[Tensor]) -> Tensor:
        """L2 norms of weights and of their changes, shape (2, n), left on the device.

        Args:
            before: From `copies`.
            after: The weights now, in the same order.
        """

    def sizes(self) -> list[int]:
        """Number of elements of each column's variable."""
        assert self.columns is not None
        return [max(1, parameter.size) for parameter in self.columns.parameters]

    def learning_rate(self, optimizer: Any) -> Tensor | float:
        """The user's own rate, without gradwatch's factor; not measured where only a function of theirs knows it."""
        base = base_of(optimizer)
        rate = base._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            return rate(base._iterations)
        return rate if isinstance(rate, keras.Variable) else NOT_MEASURED

    def measure(
        self,
        number: int,
        optimizer: Any,
        gradients: Gradients,
        *,
        grads: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        state: Sequence[Tensor],
        lr: Tensor,
        loss: Tensor,
    ) -> tuple[Tensor, Verdict | None, Tensor | None]:
        """The row of this call, what the actions want of it, and whether to skip."""
        norms = self.norms(gradients.tensors)
        if not (isinstance(gradients.factor, float) and gradients.factor == 1.0):
            norms = norms * keras.ops.cast(gradients.factor, "float32")
        verdict, scaled = None, is_loss_scaled(optimizer)
        extras: dict[str, Any] = {"optimizer": float(number), "lr": lr, "coefficient": 1.0, "skip": 0.0}
        extras["is_update"] = 1.0 if gradients.is_update is None else gradients.is_update
        extras["loss"] = NOT_MEASURED if loss is None else loss
        if scaled:
            extras["grad_scale"] = gradients.scale
        if self.rule.actions:
            present = keras.ops.where(norms == NOT_MEASURED, 0.0, norms)
            verdict = self.rule(present, state, gradients=gradients, is_scaled=scaled)
            extras["skip"] = verdict.reason
            if self.rule.acts:
                verdict.edited = edited(grads, gradients, verdict, weights=weights, hands=self)
                is_foretold = verdict.limit is None and not verdict.by_unit
                extras["coefficient"] = verdict.coefficient if is_foretold else self._amount(norms, gradients, verdict)
        elif scaled:
            finite = keras.ops.isfinite(keras.ops.sum(norms))
            extras["skip"] = keras.ops.where(finite, 0.0, float(SKIP_REASONS.index("grad_scaler")))
        skip = verdict.skip if verdict is not None and self.rule.acts else None
        return self.row(norms, gradients, extras), verdict, skip

    def _amount(self, norms: Tensor, gradients: Gradients, verdict: Verdict) -> Tensor:
        """The factor on the global norm that clipping elements or units amounts to."""
        used = self.norms([verdict.edited[place] for place in gradients.places])
        factor: Any = gradients.factor
        if gradients.is_update is not None and gradients.scale is not None:
            factor = factor / gradients.scale  # the whole is handed over with the scale on it
        squares = [keras.ops.sum(each * each) for each in (used * keras.ops.cast(factor, "float32"), norms)]
        ratio = keras.ops.sqrt(squares[0] / squares[1])
        is_clipped = keras.ops.isfinite(ratio)
        if verdict.skip is not None:
            is_clipped = keras.ops.logical_and(is_clipped, keras.ops.logical_not(verdict.skip))
        return keras.ops.where(is_clipped, ratio, 1.0)

    def row(self, norms: Tensor, gradients: Gradients, extras: dict[str, Tensor | float]) -> Tensor:
        """See `keras_rule.row`."""
        return row(norms, gradients, extras, width=self.width)


def _unit_norms(tensor: Tensor) -> Tensor:
    rank = len(tensor.shape)
    axes = tuple(range(rank - 1)) if rank > 1 else None
    squares = keras.ops.square(keras.ops.cast(tensor, "float32"))
    return keras.ops.sqrt(keras.ops.sum(squares, axis=axes, keepdims=True))


_ABSENT = object()


@contextmanager
def replaced(replacements: Iterable[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Methods of single objects stand replaced until the block ends; their classes are not touched."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner, name, function in replacements:
            attributes = vars(owner)
            saved.append((attributes, name, attributes.get(name, _ABSENT)))
            attributes[name] = function
        yield
    finally:
        for attributes, name, before in reversed(saved):
            if before is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = before


def no_rows(width: int) -> Floats:
    """An empty result of `drain`."""
    return np.empty((0, width + len(EXTRAS)), np.float32)
