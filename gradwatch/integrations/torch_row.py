"""The step in progress: its row of the record, its optimizers' steps, and the numbers that the user logs for it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.backends.torch_device import Transfer, host_or_copy, on_host
from gradwatch.backends.torch_gradients import Held
from gradwatch.backends.torch_statistics import Finish
from gradwatch.backends.torch_step import KeptCounters
from gradwatch.records import DISCARDED, NOT_MEASURED, Floats
from gradwatch.rows import number

Setter = Callable[[Any], None]
#: The norms of a row that has none yet.
_NOTHING: npt.NDArray[np.float32] = np.empty(0, np.float32)
_MOST_RATES = 8  # learning rates recorded: optimizers, and groups of one


class Row:
    """One row of the record while it is open.

    Numbers on an accelerator are not waited for: they are kept with what is to be done once they have arrived.

    Args:
        number: Of the step.
        width: Number of columns.
        is_sampled: Whether the sampled statistics are taken at this step.
    """

    __slots__ = (
        "_later", "_transfer", "is_sampled", "metrics", "norms", "number", "skip_reason", "stage", "statistics",
        "stepped", "width",
    )  # fmt: skip

    def __init__(self, number: int, width: int, *, is_sampled: bool) -> None:
        self.number, self.width, self.is_sampled = number, width, is_sampled
        self.metrics: dict[str, float] = {"time": time.time()}
        self.norms: npt.NDArray[np.float32] = _NOTHING
        self.statistics: dict[str, Floats] = {}
        self.stepped: set[int] = set()
        self.stage, self.skip_reason = "pre_clip", ""
        self._later: list[tuple[Tensor, Setter]] = []
        self._transfer: Transfer | None = None

    def put_optimizer(self, number: int, optimizer: Optimizer) -> None:
        """An optimizer steps in this row: its learning rates."""
        self.stepped.add(number)
        if number >= _MOST_RATES:
            return
        for place, group in enumerate(optimizer.param_groups[:_MOST_RATES]):
            lr = group.get("lr")
            name = "lr" if number == place == 0 else f"lr.{number}.{place}"
            if lr.__class__ is float:
                self.metrics[name] = lr
            elif lr is not None:
                self.put_metric(name, host_or_copy(lr))

    def put(self, value: Any, setter: Setter) -> None:
        """`setter(value)`, now or when the value has come from the device, as a flat float32 array."""
        if isinstance(value, Tensor):
            self._later.append((value, setter))
        else:
            setter(value)

    def put_metric(self, name: str, value: Any) -> None:
        """A number of the step, such as the loss."""
        if isinstance(value, Tensor):
            self._later.append((value, lambda number: self.metrics.__setitem__(name, _scalar(number))))
        else:
            self.metrics[name] = float(value)

    def put_norms(self, held: Held, norms: Any) -> None:
        """Gradient norms of one optimizer's parameters."""
        if isinstance(norms, Tensor):
            self._later.append((norms, lambda numbers: self._set_norms(held, numbers)))
        elif held.is_all and self.norms is _NOTHING:
            self.norms = norms
        else:
            self._set_norms(held, norms)

    def _set_norms(self, held: Held, norms: npt.NDArray[np.float32]) -> None:
        # Not in place: what the row holds may be the measurement's own array.
        every = np.full(self.width, NOT_MEASURED, np.float32) if self.norms is _NOTHING else self.norms.copy()
        every[held.index] = norms
        self.norms = every

    def put_norms_at(self, places: Sequence[int], norms: Sequence[Any]) -> None:
        """Gradient norms that became known later, of the parameters at these places."""
        index = np.array(places, np.intp)

        def set_norms(numbers: Any) -> None:
            every = self.norms.copy()
            every[index] = numbers
            self.norms = every

        on_device = any(isinstance(norm, Tensor) for norm in norms)
        self.put(torch.stack([torch.as_tensor(norm) for norm in norms]) if on_device else norms, set_norms)

    def put_statistics(self, names: Sequence[str], places: Sequence[int], values: Any) -> None:
        """Sampled statistics of one optimizer's parameters, shape (number of names, number of places)."""

        def merge(numbers: Any) -> None:
            for name, found in zip(names, np.reshape(numbers, (len(names), len(places))), strict=True):
                column = np.full(self.width, NOT_MEASURED, np.float32)
                column[places] = found
                self.merge({name: column})

        self.put(values, merge)

    def put_coefficient(self, coefficient: Any) -> None:
        """A clip coefficient; of several optimizers the smallest counts."""
        if coefficient.__class__ is float and "clip_coefficient" not in self.metrics:
            self.metrics["clip_coefficient"] = coefficient
        else:
            self.put(coefficient, self._set_coefficient)

    def put_skip(self, skip: Any, norm: Any, *, reason: str = "") -> None:
        """Whether a step is skipped; without a reason the norm tells whether it was a spike or not finite."""

        def decide(number: Any) -> None:
            if _scalar(number):
                why = reason or ("spike" if np.isfinite(self.metrics.pop("_norm", norm)) else "nonfinite")
                self.skip_reason = "grad_scaler" if "grad_scaler" in (self.skip_reason, why) else why

        if isinstance(skip, Tensor) and not reason:
            self.put(norm, lambda number: self.metrics.__setitem__("_norm", _scalar(number)))
        self.put(skip, decide)

    def merge(self, statistics: dict[str, Floats]) -> None:
        """Add statistics of one optimizer's parameters."""
        for name, values in statistics.items():
            known = self.statistics.get(name)
            self.statistics[name] = values if known is None else np.where(values != NOT_MEASURED, values, known)

    def widen(self, count: int) -> None:
        """Make room for parameters that came while the row was open."""
        if self.norms is not _NOTHING:
            more = np.full(count - self.width, NOT_MEASURED, np.float32)
            self.norms = np.concatenate([self.norms, more])
        self.width = count

    def send(self) -> bool:
        """Start copying what is on a device; whether there is anything."""
        if self._later:
            self._transfer = Transfer([tensor for tensor, _ in self._later])
        return self._transfer is not None

    @property
    def is_here(self) -> bool:
        """Whether all numbers are on the host."""
        return self._transfer is None

    def receive(self) -> None:
        """Fill in what was copied."""
        if self._transfer is not None:
            for (_, setter), numbers in zip(self._later, self._transfer.arrived(), strict=True):
                setter(numbers)
            self._later, self._transfer = [], None
            self.metrics.pop("_norm", None)
        if self.norms is _NOTHING:
            self.norms = np.full(self.width, NOT_MEASURED, np.float32)

    def _set_coefficient(self, coefficient: Any) -> None:
        found, known = _scalar(coefficient), self.metrics.get("clip_coefficient")
        if known is None or found < known:
            self.metrics["clip_coefficient"] = found


class Step:
    """One optimizer's step in progress: what must be undone and finished when it is over."""

    __slots__ = ("counters", "evaluations", "held", "nested", "optimizer", "undo", "updates")

    def __init__(self, optimizer: Optimizer, held: Held) -> None:
        self.optimizer, self.held = optimizer, held
        self.evaluations = self.nested = 0
        self.undo: list[Callable[[], None]] = []
        self.updates: Finish | None = None
        self.counters: KeptCounters | None = None


class Logbook:
    """Which step a logged number belongs to.

    What is logged between backward and step belongs to that step, as does what is logged before backward by a loop that
    logs before its very first step; everything else belongs to the step taken last. A loss that is not finite and is
    followed by another for the same step was one that the loop left out: it is counted.
    """

    def __init__(self) -> None:
        self._current: dict[str, Any] = {}
        self._ahead: dict[str, Any] = {}
        self._early: set[str] = set()

    def add(self, numbers: dict[str, Any], *, is_first: bool, is_ahead: bool, is_repeated: bool = False) -> None:
        """Note numbers.

        Args:
            numbers: Names to numbers or scalar tensors.
            is_first: No step was taken yet.
            is_ahead: A backward pass was seen since the last step.
            is_repeated: The step evaluates its closure once more; what the first evaluation logged stays.
        """
        if is_first:
            self._early.update(numbers)
        for name, value in numbers.items():
            book = self._ahead if is_first or is_ahead or name in self._early else self._current
            if is_repeated and name in book:
                continue
            if name == "loss" and _is_lost(book.get(name)):
                book[DISCARDED] = book.get(DISCARDED, 0.0) + 1.0
            book[name] = value

    def stepping(self) -> None:
        """An optimizer steps: what was logged ahead belongs to the row that is open now."""
        if self._ahead:
            self._current.update(self._ahead)
            self._ahead = {}

    def take(self, *, is_last: bool = False) -> dict[str, Any]:
        """What was logged for the row that is closed; at the end, also what was meant for a step that never came."""
        taken = {**self._ahead, **self._current} if is_last else self._current
        self._current = {}
        return taken


def is_nested(optimizer: Optimizer) -> bool:
    """Whether we are called from a step inside a step of one optimizer (of a subclass that calls `super().step()`)."""
    frame, found = sys._getframe(1), 0  # noqa: SLF001 -- the documented way to the caller's frame
    while frame is not None and found < 2:
        if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer:
            found += 1
        frame = frame.f_back  # type: ignore[assignment]
    return found > 1


def _is_lost(loss: Any) -> bool:
    return isinstance(loss, float) and not math.isfinite(loss)


def _scalar(number: Any) -> float:
    return float(number[0]) if isinstance(number, np.ndarray) and number.ndim else float(number)


def logged_number(name: str, value: Any) -> Any:
    """A logged value as a float; a scalar tensor on an accelerator as a copy there."""
    if isinstance(value, Tensor) and value.numel() == 1:
        if not on_host(value):
            return host_or_copy(value)
        value = value.item()
    return number(name, value)
