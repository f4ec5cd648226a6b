"""Turns single steps into batches: preallocated arrays that grow with new parameters and metrics."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import (
    METRICS,
    MODULE_STATISTICS,
    NOT_MEASURED,
    PARAMETER_STATISTICS,
    Floats,
    Parameter,
    Samples,
    StepBatch,
)

_BLANK = frozenset(METRICS)


#: A step but for its norms: number, metrics, statistics, stage, reason of a skip.
_Closed = tuple[int, dict[str, float], dict[str, Floats] | None, int, int]


class Rows:
    """Collects closed steps until they are taken as a `StepBatch`.

    One thread adds and takes; any may have the news told, so that what waits here is not lost with the process.

    Args:
        parameters: The columns.
        modules: The columns of module statistics.
        capacity: Steps that fit.
    """

    def __init__(self, parameters: tuple[Parameter, ...], *, modules: tuple[str, ...] = (), capacity: int = 1) -> None:
        self.parameters, self.modules, self.capacity = parameters, modules, capacity
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._clear()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether the next `add` must be preceded by `take`."""
        return len(self._steps) >= self.capacity

    def _clear(self) -> None:
        self._steps: list[_Closed] = []
        self._norms: npt.NDArray[np.float32] = np.empty((self.capacity, len(self.parameters)), np.float32)
        self._told = 0
        self._whole: StepBatch | None = None

    def add(
        self,
        step: int,
        norms: Floats,
        metrics: dict[str, float],
        *,
        statistics: dict[str, Floats] | None = None,
        stage: int = 0,
        skip_reason: int = 0,
    ) -> None:
        """Add one step; `norms` may be shorter than the columns (parameters that came later)."""
        row, width = self._norms[len(self._steps)], len(norms)
        if width == len(row):
            row[:] = norms
        else:
            row[:width] = norms
            row[width:] = NOT_MEASURED
        self._steps.append((step, metrics, statistics, stage, skip_reason))

    def take(self) -> StepBatch:
        """The collected steps as a batch that owns its arrays, `global_norm` among its metrics; starts anew."""
        with self._locked():
            count = len(self._steps)
            whole = self._whole if self._whole is not None and len(self._whole) == count else self._batch(0, count)
            self._clear()
        return whole

    def tell(self, put: Callable[[StepBatch], object]) -> None:
        """Hand over the steps that were added since the last call, which `take` will give all the same.

        Args:
            put: Called with them, in their order also where two threads ask at once; not without any.
        """
        with self._locked():
            begin, end = self._told, len(self._steps)
            if begin == end:
                return
            batch = self._batch(begin, end)
            if not begin:
                self._whole = batch
            put(batch)
            self._told = end

    def _locked(self) -> threading.Lock:
        if os.getpid() != self._pid:  # in a forked child the lock may be held by a thread that is not there
            self._lock, self._pid = threading.Lock(), os.getpid()
        return self._lock

    def _batch(self, begin: int, end: int) -> StepBatch:
        norms = self._norms[begin:end]
        steps, numbers, statistics, stages, reasons = zip(*self._steps[begin:end], strict=True)
        names = sorted(_BLANK.union(*numbers))
        table = np.array([[known.get(name, NOT_MEASURED) for known in numbers] for name in names])
        metrics = dict(zip(names, table, strict=True))
        unknown = metrics["global_norm"] == NOT_MEASURED
        if unknown.any():
            metrics["global_norm"][unknown] = global_norms(norms[unknown])
        return StepBatch(
            parameters=self.parameters,
            step=np.array(steps, np.int64),
            grad_norm=norms,
            metrics=metrics,
            statistics=self._samples(statistics),
            modules=self.modules,
            stage=np.array(stages, np.int8),
            skip_reason=np.array(reasons, np.int8),
        )

    def _samples(self, statistics: Iterable[dict[str, Floats] | None]) -> dict[str, Samples]:
        found: dict[str, list[tuple[int, Floats]]] = {}
        for row, sampled in enumerate(statistics):
            for name, values in (sampled or {}).items():
                found.setdefault(name, []).append((row, values))
        return {name: self._stack(name, samples) for name, samples in found.items()}

    def _stack(self, name: str, samples: list[tuple[int, Floats]]) -> Samples:
        width = len(self.modules if name in MODULE_STATISTICS else self.parameters)
        stacked = np.full((len(samples), width), NOT_MEASURED, np.float32)
        for row, (_, values) in enumerate(samples):
            stacked[row, : len(values)] = values
        return Samples(rows=np.array([row for row, _ in samples], np.int64), values=stacked)


def number(name: str, value: Any) -> float:
    """A logged value as a float; minus infinity, which stands for "not measured", becomes NaN.

    Raises:
        ConfigurationError: For what is no number.
    """
    try:
        number = float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError):
        raise ConfigurationError.of(name, "a number or a scalar tensor", value) from None
    return math.nan if number == NOT_MEASURED else number


def checked_norms(
    grad_norm: Floats | Sequence[float], statistics: Mapping[str, Floats], count: int
) -> npt.NDArray[np.float32]:
    """The norms of a step that the user measured, as an array.

    Raises:
        ConfigurationError: When they, or one of the statistics, are not `count` numbers.
    """
    try:
        with np.errstate(over="ignore"):  # beyond float32 is infinite
            norms: npt.NDArray[np.float32] = np.asarray(grad_norm, np.float32)
    except (TypeError, ValueError):
        raise ConfigurationError.of("grad_norm", "an array of numbers", grad_norm) from None
    if norms.shape != (count,):
        raise ConfigurationError.of("grad_norm", f"of shape ({count},)", norms.shape)
    for name, values in statistics.items():
        if name not in PARAMETER_STATISTICS + MODULE_STATISTICS:
            raise UnknownNameError.among("statistic", name, PARAMETER_STATISTICS + MODULE_STATISTICS)
        if np.shape(values) != norms.shape:
            raise ConfigurationError.of(f"statistics[{name!r}]", f"of shape {norms.shape}", np.shape(values))
    return norms


def global_norms(norms: Floats) -> npt.NDArray[np.float64]:
    """Root of the sum of squares of what was measured in each step; `NOT_MEASURED` where nothing was.

    Args:
        norms: Shape (n, p).

    Examples:
        >>> global_norms(np.array([[3.0, 4.0, NOT_MEASURED]]))
        array([5.])
    """
    measured = norms != NOT_MEASURED
    with np.errstate(over="ignore"):
        squares = np.square(norms, dtype=np.float64, where=measured, out=np.zeros(norms.shape))
        found: npt.NDArray[np.float64] = np.sqrt(np.add.reduce(squares, axis=1))
    if not measured.all():
        found[~measured.any(axis=1)] = NOT_MEASURED
    return found


def global_norm(norms: Floats) -> float:
    """Root of the sum of squares of what was measured; `NOT_MEASURED` when nothing was.

    Examples:
        >>> global_norm(np.array([3.0, 4.0, NOT_MEASURED]))
        5.0
    """
    return float(global_norms(np.asarray(norms)[np.newaxis])[0])
