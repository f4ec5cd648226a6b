"""What a sink shows of a step: numbers with a family and a name."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradwatch.records import MODULE_STATISTICS, NOT_MEASURED, Floats, Layers, Parameter, StepBatch

#: Family of numbers that belong to the whole step: loss, global norm and the like.
METRICS_FAMILY = "metrics"
#: Statistics of a layer's parameters that join as norms do; of others the layer shows the largest.
_NORMS = ("grad_norm", "weight_norm")


@dataclass(frozen=True, slots=True)
class Row:
    """The numbers of one step.

    Args:
        step: Its number.
        time: Unix time of its end.
        values: Family (`metrics`, or a statistic) and name (of a metric, layer, parameter or module) to number.
    """

    step: int
    time: float
    values: dict[tuple[str, str], float]


class Table:
    """Turns batches into rows.

    Args:
        by: `layer` or `parameter`: what the statistics of parameters are shown for.
    """

    def __init__(self, by: str) -> None:
        self._by_layer = by == "layer"
        self._parameters: tuple[Parameter, ...] | None = None
        self._layers = Layers(())
        self._names: tuple[str, ...] = ()

    def rows(self, batch: StepBatch, every: int) -> Iterator[Row]:
        """The steps whose number `every` divides, and the samples of the dearer statistics whenever they were taken."""
        self._learn(batch.parameters)
        times = batch.metric("time").tolist()
        for i, step in enumerate(batch.step.tolist()):
            values: dict[tuple[str, str], float] = {}
            if step % every == 0:
                for name, numbers in batch.metrics.items():
                    if name != "time" and (number := float(numbers[i])) != NOT_MEASURED:
                        values[METRICS_FAMILY, name] = number
                _add(values, "grad_norm", self._names, self._columns("grad_norm", batch.grad_norm[i : i + 1])[0])
            for family, samples in batch.statistics.items():
                place = int(np.searchsorted(samples.rows, i))
                if place < len(samples.rows) and samples.rows[place] == i:
                    one = samples.values[place : place + 1]
                    if family in MODULE_STATISTICS:
                        _add(values, family, batch.modules, one[0])
                    else:
                        _add(values, family, self._names, self._columns(family, one)[0])
            if values:
                yield Row(step, times[i] if math.isfinite(times[i]) else time.time(), values)

    def _learn(self, parameters: tuple[Parameter, ...]) -> None:
        if parameters is not self._parameters:
            self._parameters, self._layers = parameters, Layers(parameters)
            self._names = self._layers.names if self._by_layer else tuple(parameter.name for parameter in parameters)

    def _columns(self, family: str, values: Floats) -> Floats:
        if not self._by_layer:
            return values
        if family in _NORMS:
            return self._layers.norms(values)
        largest = np.full((len(self._layers), len(values)), NOT_MEASURED)
        np.maximum.at(largest, self._layers.of_parameter, values.T)
        return largest.T


def _add(values: dict[tuple[str, str], float], family: str, names: tuple[str, ...], numbers: Floats) -> None:
    for name, number in zip(names, numbers.tolist(), strict=True):
        if number != NOT_MEASURED:
            values[family, name] = number
