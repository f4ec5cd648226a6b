"""Reads a run: running, finished, crashed or killed; DataFrames and batches out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradwatch.errors import ConfigurationError, RunNotFoundError, UnknownNameError
from gradwatch.records import (
    METRICS,
    MODULE_STATISTICS,
    NOT_MEASURED,
    PARAMETER_STATISTICS,
    SKIP_REASONS,
    STAGES,
    ActionRecord,
    Finding,
    Ints,
    Layers,
    Parameter,
    RunInfo,
    StepBatch,
)
from gradwatch.storage.catalog import Catalog, Segment
from gradwatch.storage.events import RESUMED, decode_events, whole_lines
from gradwatch.storage.files import files_at
from gradwatch.storage.layout import EVENTS_FILE, GRAD_NORM, RUN_FILE, STEPS, metric_column

if TYPE_CHECKING:
    import pandas as pd

#: A run whose lock cannot be asked counts as crashed after so many seconds without a sign of life.
STALE = 90.0


class RunReader:
    """A run directory, opened for reading; works while the run is being written and after a crash.

    Args:
        path: The run directory, or a URL that pyarrow or fsspec can read (`s3://`, `gs://`, `memory://`).

    Raises:
        RunNotFoundError: When there is no run.
        RunFormatError: When there is something else, or a run of a newer version.
        RunCorruptError: When nothing of it can be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files = files_at(path)
        self._where = os.fspath(path)
        names = self._files.listing("")
        if RUN_FILE not in names and not self._files.listing(STEPS):
            what = "is not a run directory: it has no run.json" if names else "does not exist or is empty"
            raise RunNotFoundError(f"{self._where} {what}")
        self._catalog = Catalog(self._files)
        self._facts = self._catalog.facts(f"{self._where}/{RUN_FILE}")
        self._events: list[dict[str, Any]] = []
        self._events_offset = 0
        self._steps: Ints | None = None
        self._read_events()

    def refresh(self) -> None:
        """Look for what was written since."""
        self._catalog.refresh()
        self._facts = self._catalog.facts(f"{self._where}/{RUN_FILE}")
        self._steps = None
        self._read_events()

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def info(self) -> RunInfo:
        """The facts of the run. A run that says it is running and whose process is gone reads as `crashed`."""
        info = self._facts.info
        if info.status != "running":
            return info
        locked = self._files.is_locked()
        if locked or (locked is None and time.time() - info.heartbeat < STALE):
            return info
        detail = info.status_detail or "the process ended without closing the run"
        return dataclasses.replace(info, status="crashed", status_detail=detail)

    @property
    def processes(self) -> list[dict[str, Any]]:
        """The processes that wrote the run, in order: host, pid, started, first step, status, versions."""
        return self._facts.processes

    @property
    def damage(self) -> dict[str, str]:
        """Files that could not be read, and why; the rest of the run is there."""
        return self._catalog.damage

    @property
    def steps(self) -> Ints:
        """All recorded steps, int64 of shape (n,), ascending."""
        if self._steps is None:
            found = [segment.step[rows] for _, segment, rows in self._catalog.readable()]
            self._steps = np.concatenate([np.empty(0, np.int64), *found])
        return self._steps

    def __len__(self) -> int:
        return sum(rows.stop for _, _, rows in self._catalog.readable())

    # -- steps -------------------------------------------------------------------------------------------------------

    def batches(self, size: int = 1000, statistics: Sequence[str] | None = None) -> Iterator[StepBatch]:
        """The steps as the writer was given them, in pieces of at most `size`.

        Args:
            size: Steps in a piece.
            statistics: Sampled statistics to read; all by default.
        """
        if size < 1:
            raise ConfigurationError.of("size", ">= 1", size)
        known = {parameter.name: parameter for parameter in self._facts.info.parameters}
        for _, segment, rows in self._catalog.readable():
            parameters = tuple(known.get(name) or Parameter(name) for name in segment.layout.parameters)
            if parameters == self._facts.info.parameters:
                parameters = self._facts.info.parameters
            yield from segment.batch(parameters, statistics)[rows].split(size)

    def grad_norms(
        self,
        by: str = "parameter",
        *,
        layers: str | Sequence[str] | None = None,
        steps: slice | None = None,
        resolution: int | None = None,
    ) -> pd.DataFrame:
        """Gradient norms, one row per step.

        Args:
            by: `parameter` or `layer`.
            layers: Only these: a name, a pattern such as `encoder.*`, or a list of them.
            steps: Only these step numbers, such as `slice(0, 10_000)`.
            resolution: Steps in a row: reads the rollups instead (geometric mean).

        Returns:
            Index `step`; NaN where nothing was measured.
        """
        if by not in ("parameter", "layer"):
            raise UnknownNameError.among("by", by, ("parameter", "layer"))
        import pandas as pd

        parameters = self._chosen(layers)
        step, values = self._read(GRAD_NORM, [p.name for p in parameters], steps)
        if by == "layer":
            groups = Layers(parameters)
            return pd.DataFrame(_shown(groups.norms(values)), index=_index(step), columns=pd.Index(groups.names, name="layer"))
        return pd.DataFrame(_shown(values), index=_index(step), columns=pd.Index([p.name for p in parameters], name="parameter"))

    def statistic(
        self,
        name: str,
        *,
        layers: str | Sequence[str] | None = None,
        steps: slice | None = None,
        resolution: int | None = None,
    ) -> pd.DataFrame:
        """A statistic at the steps at which it was sampled; as `grad_norms`. Columns are parameters, or modules."""
        if name == GRAD_NORM:
            return self.grad_norms(layers=layers, steps=steps, resolution=resolution)
        import pandas as pd

        if name in MODULE_STATISTICS:
            names = [m for m in self._modules() if _matches(m, layers)]
        else:
            names = [p.name for p in self._chosen(layers)]
        step, values = self._read(name, names, steps)
        return pd.DataFrame(_shown(values), index=_index(step), columns=names)

    def metrics(self, steps: slice | None = None) -> pd.DataFrame:
        """Loss, learning rate and all that was logged, one row per step, NaN where not known."""
        import pandas as pd

        names = dict.fromkeys(METRICS)
        parts = []
        for _, segment, rows in self._catalog.readable():
            rows = _within(segment.step, rows, steps)
            batch = segment.batch((), ())[rows]
            names.update(dict.fromkeys(segment.layout.metrics))
            parts.append(batch)
        step = np.concatenate([np.empty(0, np.int64), *(b.step for b in parts)])
        columns = {n: _shown(np.concatenate([np.empty(0), *(b.metric(n) for b in parts)])) for n in names}
        columns["stage"] = np.array(STAGES, object)[np.concatenate([np.empty(0, np.int8), *(b.stage for b in parts)]).astype(int)]
        columns["skip_reason"] = np.array(SKIP_REASONS, object)[np.concatenate([np.empty(0, np.int8), *(b.skip_reason for b in parts)]).astype(int)]
        return pd.DataFrame(columns, index=_index(step))

    def parameters(self) -> pd.DataFrame:
        """The parameters, one row each."""
        import pandas as pd

        fields = [f.name for f in dataclasses.fields(Parameter)]
        rows = [{**{n: getattr(p, n) for n in fields}, "size": p.size} for p in self._facts.info.parameters]
        return pd.DataFrame(rows, columns=[*fields, "size"]).set_index("name")

    def _modules(self) -> tuple[str, ...]:
        names = dict.fromkeys(self._facts.info.modules)
        for _, segment, _ in self._catalog.readable():
            names.update(dict.fromkeys(segment.layout.modules))
        return tuple(names)

    def _chosen(self, layers: str | Sequence[str] | None) -> list[Parameter]:
        chosen = [p for p in self._facts.info.parameters if _matches(p.layer, layers)]
        if layers is not None and not chosen:
            raise UnknownNameError.among("layer", layers, {p.layer for p in self._facts.info.parameters})
        return chosen

    def _read(self, statistic: str, names: list[str], steps: slice | None) -> tuple[Ints, npt.NDArray[np.float32]]:
        all_steps, blocks = [np.empty(0, np.int64)], [np.empty((0, len(names)), np.float32)]
        for _, segment, rows in self._catalog.readable():
            rows = _within(segment.step, rows, steps)
            there = set(segment.layout.names(statistic))
            present = [i for i, name in enumerate(names) if name in there]
            samples = segment.values(statistic, [names[i] for i in present])
            low, high = np.searchsorted(samples.rows, (rows.start, rows.stop))
            block = np.full((high - low, len(names)), NOT_MEASURED, np.float32)
            block[:, present] = samples.values[low:high]
            all_steps.append(segment.step[samples.rows[low:high]])
            blocks.append(block)
        return np.concatenate(all_steps), np.concatenate(blocks)

    # -- events ------------------------------------------------------------------------------------------------------

    def _read_events(self) -> None:
        try:
            data = self._files.read(EVENTS_FILE, self._events_offset)
        except FileNotFoundError:
            return
        self._events_offset += whole_lines(data)
        self._events += decode_events(data)

    def finding_list(self) -> list[Finding]:
        """The findings in order of their opening, each as last reported."""
        found: dict[str, Finding] = {}
        for event in self._events:
            if event["kind"] == "finding":
                f = Finding.from_json(event)
                found[f.id] = f
        return list(found.values())

    def action_list(self) -> list[ActionRecord]:
        """The actions in order, each as last reported."""
        found: dict[str, ActionRecord] = {}
        for event in self._events:
            if event["kind"] == "action":
                a = ActionRecord.from_json(event)
                found[a.id] = a
        return list(found.values())

    def marks(self) -> list[dict[str, Any]]:
        """Marks: what else happened, such as a resumption."""
        return [e for e in self._events if e["kind"] == "mark"]

    def findings(self) -> pd.DataFrame:
        """The findings, one row each."""
        import pandas as pd

        columns = "rule severity first_step last_step layer parameter value threshold cause advice resolved_step".split()
        rows = [
            (f.rule, f.severity, f.first_step, f.last_step, f.layers[0] if f.layers else "", f.parameters[0] if f.parameters else "",
             f.value, f.threshold, f.cause, "; ".join(f.advice), f.resolved_step)
            for f in self.finding_list()
        ]
        return pd.DataFrame(rows, columns=columns)

    def actions(self) -> pd.DataFrame:
        """The actions, one row each."""
        import pandas as pd

        columns = "step action layer detail reason before after outcome".split()
        rows = [(a.step, a.action, a.layers[0] if a.layers else "", a.detail, a.reason, a.before, a.after, a.outcome) for a in self.action_list()]
        return pd.DataFrame(rows, columns=columns)


def _matches(name: str, patterns: str | Sequence[str] | None) -> bool:
    if patterns is None:
        return True
    return any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def _within(step: Ints, rows: slice, steps: slice | None) -> slice:
    if steps is None:
        return rows
    low = 0 if steps.start is None else int(np.searchsorted(step, steps.start))
    high = rows.stop if steps.stop is None else int(np.searchsorted(step, steps.stop))
    return slice(min(low, rows.stop), min(high, rows.stop))


def _index(step: Ints) -> Any:
    import pandas as pd

    return pd.Index(step, name="step")


def _shown(values: Any) -> Any:
    return np.where(values == NOT_MEASURED, np.nan, values)
