"""Turns single steps into batches: preallocated arrays that grow with new parameters and metrics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradwatch.records import METRICS, MODULE_STATISTICS, NOT_MEASURED, Floats, Parameter, Samples, StepBatch

_BLANK = dict.fromkeys(METRICS, NOT_MEASURED)


class Rows:
    """Collects closed steps until they are taken as a `StepBatch`.

    Args:
        parameters: The columns.
        modules: The columns of module statistics.
        capacity: Steps that fit.
    """

    def __init__(self, parameters: tuple[Parameter, ...], *, modules: tuple[str, ...] = (), capacity: int = 1) -> None:
        self.parameters, self.modules, self.capacity = parameters, modules, capacity
        self._clear()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether the next `add` must be preceded by `take`."""
        return len(self._steps) >= self.capacity

    def _clear(self) -> None:
        self._steps: list[int] = []
        self._norms: npt.NDArray[np.float32] = np.empty((self.capacity, len(self.parameters)), np.float32)
        self._metrics: list[dict[str, float]] = []
        self._samples: dict[str, list[tuple[int, Floats]]] = {}
        self._stages: list[int] = []
        self._reasons: list[int] = []

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
        row = len(self._steps)
        self._norms[row, : len(norms)] = norms
        self._norms[row, len(norms) :] = NOT_MEASURED
        self._steps.append(step)
        self._metrics.append(metrics)
        self._stages.append(stage)
        self._reasons.append(skip_reason)
        for name, values in (statistics or {}).items():
            self._samples.setdefault(name, []).append((row, values))

    def take(self) -> StepBatch:
        """The collected steps as a batch that owns its arrays; starts anew."""
        n = len(self._steps)
        names = _BLANK.keys() | {name for metrics in self._metrics for name in metrics}
        batch = StepBatch(
            parameters=self.parameters,
            step=np.array(self._steps, np.int64),
            grad_norm=self._norms[:n],
            metrics={name: np.array([m.get(name, NOT_MEASURED) for m in self._metrics]) for name in sorted(names)},
            statistics={name: self._stack(name, samples) for name, samples in self._samples.items()},
            modules=self.modules,
            stage=np.array(self._stages, np.int8),
            skip_reason=np.array(self._reasons, np.int8),
        )
        self._clear()
        return batch

    def _stack(self, name: str, samples: list[tuple[int, Floats]]) -> Samples:
        width = len(self.modules if name in MODULE_STATISTICS else self.parameters)
        stacked = np.full((len(samples), width), NOT_MEASURED, np.float32)
        for row, (_, values) in enumerate(samples):
            stacked[row, : len(values)] = values
        return Samples(rows=np.array([row for row, _ in samples], np.int64), values=stacked)
