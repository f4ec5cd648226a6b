"""Reads a run: running, finished, crashed or killed; batches, rollups and DataFrames out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradwatch.errors import ConfigurationError, RunNotFoundError, UnknownNameError
from gradwatch.records import (
    METRICS,
    MODULE_STATISTICS,
    PARAMETER_STATISTICS,
    ActionRecord,
    Finding,
    Ints,
    Layers,
    Parameter,
    RunInfo,
    StepBatch,
)
from gradwatch.redaction import without_credentials
from gradwatch.storage import frames
from gradwatch.storage.catalog import Catalog
from gradwatch.storage.events import EventLog
from gradwatch.storage.files import files_at
from gradwatch.storage.layout import GRAD_NORM, RUN_FILE, STEPS
from gradwatch.storage.rollups import METRIC, Rollup
from gradwatch.storage.selection import Patterns, check_steps, matching, read_metrics, read_rollup, read_values

if TYPE_CHECKING:
    import pandas as pd

#: A run whose lock cannot be asked counts as crashed after so many seconds without a sign of life.
STALE = 90.0


class RunReader:
    """A run directory, opened for reading; works while the run is being written, and after a crash.

    What is damaged is left out, said in the log and listed in `damage`; the rest can be read.

    Args:
        path: The run directory, or a URL that pyarrow or fsspec can read (`s3://`, `gs://`, `memory://`).

    Attributes:
        path: The same, as a path; without the credentials of a URL.

    Raises:
        RunNotFoundError: When there is no run.
        RunFormatError: When there is something else, or a run of a newer version.
        RunCorruptError: When nothing of it can be read.

    Examples:
        >>> import tempfile
        >>> from gradwatch.testing import write_run
        >>> run = RunReader(write_run(tempfile.mkdtemp() + "/run", steps=2000, parameters=6))
        >>> len(run)
        2000
        >>> run.grad_norms(steps=slice(10, 20)).shape
        (10, 6)
        >>> run.rollup(1000).maximum.shape
        (2, 6)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._where = without_credentials(os.fspath(path))
        self.path = Path(self._where)
        self._files = files_at(path)
        names = self._files.listing("")
        if RUN_FILE not in names and not self._files.listing(STEPS):
            what = "is no run: it has no run.json" if names else "does not exist or is empty"
            raise RunNotFoundError(f"{self._where} {what}")
        self._catalog = Catalog(self._files)
        self._events = EventLog(self._files)
        self._facts = self._catalog.facts(f"{self._where}/{RUN_FILE}")
        self._steps: Ints | None = None

    def refresh(self) -> None:
        """Look for what was written since; cheap when there is little."""
        self._catalog.refresh()
        self._events.refresh()
        self._facts = self._catalog.facts(f"{self._where}/{RUN_FILE}")
        self._steps = None

    @property
    def info(self) -> RunInfo:
        """The facts of the run. A run that says it is running but whose process is gone reads as `crashed`."""
        info = self._facts.info
        if info.status != "running":
            return info
        locked = self._files.is_locked()
        if locked or (locked is None and time.time() - info.heartbeat < STALE):
            return info
        return dataclasses.replace(info, status="crashed", status_detail="the process ended without closing the run")

    @property
    def processes(self) -> list[dict[str, Any]]:
        """The processes that wrote the run, in order: host, pid, started, ended, status, first_step, versions."""
        return [dict(process) for process in self._facts.processes]

    @property
    def damage(self) -> dict[str, str]:
        """What could not be read so far, and why."""
        return dict(self._catalog.damage)

    @property
    def steps(self) -> Ints:
        """All recorded steps, int64 of shape (n,), ascending."""
        if self._steps is None:
            found = [segment.step[rows] for _, segment, rows in self._catalog.readable()]
            self._steps = np.concatenate([np.empty(0, np.int64), *found])
        return self._steps

    def __len__(self) -> int:
        return sum(rows.stop for _, _, rows in self._catalog.readable())

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last recorded step, without reading those between; None for an empty run."""
        return self._catalog.span()

    # -- arrays ------------------------------------------------------------------------------------------------------

    def batches(
        self, size: int = 1000, statistics: Sequence[str] | None = None, *, steps: slice | None = None
    ) -> Iterator[StepBatch]:
        """The steps as the writer was given them, however they were cut into batches then.

        Args:
            size: At most so many steps in a batch.
            statistics: Sampled statistics to read; all by default.
            steps: Only these step numbers.
        """
        if size < 1:
            raise ConfigurationError.of("size", ">= 1", size)
        return self._catalog.batches(self._facts.info.parameters, statistics, check_steps(steps), size=size)

    def values(
        self, statistic: str = GRAD_NORM, *, layers: Patterns = None, steps: slice | None = None
    ) -> tuple[Ints, npt.NDArray[np.float32], tuple[str, ...]]:
        """A statistic as arrays, for programs; `NOT_MEASURED` where absent.

        Returns:
            The steps at which it was taken, int64 of shape (k,); the values, shape (k, c); the names of the c columns.
        """
        names = self.names(statistic, layers)
        step, values = read_values(self._catalog, statistic, names, check_steps(steps))
        return step, values, names

    def rollup(
        self, resolution: int, statistic: str = GRAD_NORM, *, layers: Patterns = None, steps: slice | None = None
    ) -> Rollup:
        """A statistic in bins of `resolution` steps: counts and extremes, none of them lost.

        Args:
            resolution: Steps in a bin. Multiples of ten are read from the rollups, others from the steps.
            statistic: Name of a statistic, or `metric` for the metrics.
            layers: Only these: a name, a pattern such as `encoder.*`, or a list of them.
            steps: Only bins that touch these step numbers.
        """
        if not isinstance(resolution, int) or resolution < 1:
            raise ConfigurationError.of("resolution", "an integer >= 1", resolution)
        names = self.metric_names if statistic == METRIC else self.names(statistic, layers)
        return read_rollup(
            self._files, self._catalog, names, check_steps(steps), statistic=statistic, resolution=resolution
        )

    def resolution_for(self, bins: int, *, steps: slice | None = None) -> int:
        """The finest power of ten at which the run (or the given steps of it) has at most `bins` bins."""
        if bins < 1:
            raise ConfigurationError.of("bins", ">= 1", bins)
        first, last = self.span or (0, 0)
        if steps is not None:
            first, last = max(first, steps.start or 0), min(last, last if steps.stop is None else steps.stop - 1)
        resolution = 1
        while last // resolution - first // resolution + 1 > bins:
            resolution *= 10
        return resolution

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of the run: those of every run, then what was logged."""
        logged = {name for layout in self._catalog.layouts() for name in layout.metrics}
        return (*METRICS, *sorted(logged - set(METRICS)))

    @property
    def statistic_names(self) -> tuple[str, ...]:
        """The statistics that were taken, `grad_norm` first."""
        taken = {name for layout in self._catalog.layouts() for name in layout.statistics}
        return (GRAD_NORM, *sorted(taken - {GRAD_NORM}))

    def names(self, statistic: str = GRAD_NORM, layers: Patterns = None) -> tuple[str, ...]:
        """What the values of a statistic belong to: parameters in order of depth, or modules."""
        known = {*PARAMETER_STATISTICS, *MODULE_STATISTICS, *self.statistic_names}
        if statistic not in known:
            raise UnknownNameError.among("statistic", statistic, known)
        if statistic in MODULE_STATISTICS:
            modules = dict.fromkeys(self._facts.info.modules)
            modules |= dict.fromkeys(name for layout in self._catalog.layouts() for name in layout.modules)
            wanted = matching("module", modules, layers)
            return tuple(name for name in modules if name in wanted)
        return tuple(parameter.name for parameter in self._chosen(layers))

    def _chosen(self, layers: Patterns) -> tuple[Parameter, ...]:
        parameters = self._facts.info.parameters
        wanted = matching("layer", (parameter.layer for parameter in parameters), layers)
        return tuple(parameter for parameter in parameters if parameter.layer in wanted)

    # -- tables ------------------------------------------------------------------------------------------------------

    def grad_norms(
        self,
        by: str = "parameter",
        *,
        layers: Patterns = None,
        steps: slice | None = None,
        resolution: int | None = None,
        aggregate: str = "mean",
    ) -> pd.DataFrame:
        """Gradient norms, one row per step, one column per parameter or layer; NaN where nothing was measured.

        Args:
            by: `parameter` or `layer`.
            layers: Only these: a name, a pattern such as `encoder.*`, or a list of them.
            steps: Only these step numbers, such as `slice(0, 10_000)`.
            resolution: One row per so many steps, from rollups; the index is the first step of each. Layers are then
                put together from their parameters: an upper bound for `maximum`, a lower one for `minimum`.
            aggregate: With `resolution`: `mean` (geometric), `minimum`, `maximum`, `count` or `nonfinite`.

        Examples:
            `run.grad_norms(by="layer", layers="encoder.*", resolution=1000, aggregate="maximum")`
        """
        if by not in ("parameter", "layer"):
            raise UnknownNameError.among("grouping", by, ("parameter", "layer"))
        if by == "parameter":
            return self.statistic(GRAD_NORM, layers=layers, steps=steps, resolution=resolution, aggregate=aggregate)
        if resolution is not None:
            rollup = self.rollup(resolution, layers=layers, steps=steps)
            return frames.by_layer(rollup, self._chosen(layers), frames.check_aggregate(aggregate))
        step, values, _ = self.values(layers=layers, steps=steps)
        groups = Layers(self._chosen(layers))
        return frames.of_values(step, groups.norms(values), groups.names)

    def statistic(
        self,
        name: str,
        *,
        layers: Patterns = None,
        steps: slice | None = None,
        resolution: int | None = None,
        aggregate: str = "mean",
    ) -> pd.DataFrame:
        """A statistic, one row per step at which it was taken; arguments and NaN as in `grad_norms`.

        Columns are parameters, or modules for the statistics of outputs.
        """
        if resolution is not None:
            rollup = self.rollup(resolution, name, layers=layers, steps=steps)
            return frames.of_rollup(rollup, frames.check_aggregate(aggregate))
        step, values, names = self.values(name, layers=layers, steps=steps)
        return frames.of_values(step, values, names)

    def metrics(self, *, steps: slice | None = None) -> pd.DataFrame:
        """Loss, learning rate and all that was logged, one row per step; NaN where not known.

        The columns `stage` and `skip_reason` are categories of words.
        """
        step, numbers = read_metrics(self._catalog, self.metric_names, check_steps(steps))
        return frames.of_metrics(step, numbers.metrics, stage=numbers.stage, skip_reason=numbers.skip_reason)

    def parameters(self) -> pd.DataFrame:
        """The parameters in order; index `name`, columns as the fields of `Parameter`, and `size`."""
        return frames.of_parameters(self._facts.info.parameters)

    def findings(self) -> pd.DataFrame:
        """The findings, one row each, in order of their opening."""
        return frames.of_findings(self.finding_list())

    def actions(self) -> pd.DataFrame:
        """The actions, one row each, in order."""
        return frames.of_actions(self.action_list())

    # -- events ------------------------------------------------------------------------------------------------------

    def finding_list(self) -> list[Finding]:
        """The findings in order of their opening, each as last reported; not those of superseded steps."""
        return self._events.findings()

    def action_list(self) -> list[ActionRecord]:
        """The actions in order, each as last reported; not those of superseded steps."""
        return self._events.actions()

    def marks(self) -> list[dict[str, Any]]:
        """What else happened: JSON objects with `name` and `time`, such as `resumed` and `thinned` with their steps."""
        return self._events.of_kind("mark")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind (`finding`, `action`, `alert`, `mark`) as written."""
        return self._events.of_kind(kind)
