"""Bringing old runs in, so that the same detectors and reports work on them: CSV tables, TensorBoard event files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.engine import Engine, replay
from gradwatch.errors import ConfigurationError, MissingDependencyError, RunNotFoundError
from gradwatch.records import (
    NOT_MEASURED,
    PARAMETER_STATISTICS,
    SKIP_REASONS,
    STAGES,
    Parameter,
    RunInfo,
    Samples,
    StepBatch,
)
from gradwatch.storage.events import encode_event
from gradwatch.storage.layout import GRAD_NORM
from gradwatch.storage.store import Store

if TYPE_CHECKING:
    import pandas as pd

#: Names of a column of gradient norms, in the exports of gradwatch and of other tools: what follows is the parameter.
GRADIENT_PREFIXES = (f"{GRAD_NORM}/", "gradients/", "grad_norm.", "grad_2.0_norm/", "gradient/", "grad/", "parameters/")
#: Names of the column that counts steps.
STEP_COLUMNS = ("step", "_step", "global_step", "Step", "trainer/global_step", "iteration", "epoch")
_METRIC_NAMES = {"_timestamp": "time", "train_loss": "loss", "train/loss": "loss", "learning_rate": "lr"}
_PIECE = 2000


def import_run(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    step: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a run out of a CSV file, or out of a directory of TensorBoard event files; arguments as in `import_csv`."""
    if Path(source).is_dir():
        return import_tensorboard(source, path, overwrite=overwrite)
    return import_csv(source, path, step=step, overwrite=overwrite)


def import_csv(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    step: str | None = None,
    gradients: Callable[[str], str | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a run out of a table with one row per step: an export of gradwatch, of W&B, or any other.

    The detectors look at it at once, as they would have while it was trained.

    Args:
        source: The CSV file.
        path: The run directory to write.
        step: The column that counts steps; by default one of `STEP_COLUMNS`, else the rows are counted.
        gradients: Says for a column which parameter's gradient norm it holds, None for a metric. By default the columns
            that begin with one of `GRADIENT_PREFIXES`.
        overwrite: Replace a run that is there.

    Returns:
        The run directory.

    Raises:
        RunNotFoundError: When there is no such file.
        ConfigurationError: When there is no column of that name, or the table cannot be read.
    """
    import pandas as pd

    if not Path(source).is_file():
        raise RunNotFoundError(f"{source} is not a file")
    try:
        table = pd.read_csv(source, low_memory=False)
    except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{source} cannot be read as a table: {error}") from error
    return import_frame(table, path, step=step, gradients=gradients, overwrite=overwrite, origin=f"csv: {source}")


def import_frame(
    table: pd.DataFrame,
    path: str | os.PathLike[str],
    *,
    step: str | None = None,
    gradients: Callable[[str], str | None] | None = None,
    overwrite: bool = False,
    origin: str = "table",
) -> Path:
    """As `import_csv`, from a DataFrame."""
    column = _step_column(table, step)
    if column is not None:
        table = table[table[column].notna()].sort_values(column, kind="stable").drop_duplicates(column, keep="last")
    steps = np.arange(len(table)) if column is None else table[column].to_numpy(np.int64)
    roles = {name: (gradients or _parameter_of)(str(name)) for name in table.columns if name != column}
    norms = {parameter: name for name, parameter in roles.items() if parameter}
    parameters = tuple(Parameter(name, depth=i) for i, name in enumerate(norms))
    numeric = [n for n, parameter in roles.items() if not parameter and _is_numeric(table[n])]
    sampled = {n: part for n in numeric if (part := _statistic_of(str(n), norms)) is not None}
    engine = Engine("default", RunContext(parameters))
    info = RunInfo(parameters, framework="import", config={"origin": origin, "detectors": engine.config()})
    store = Store(Path(path), info, overwrite=overwrite)

    def written() -> Iterator[StepBatch]:
        columns = _Columns(parameters, norms, sampled, tuple(numeric))
        for low in range(0, len(table), _PIECE):
            batch = _batch(table.iloc[low : low + _PIECE], steps[low : low + _PIECE], columns)
            store.append(batch)
            yield batch

    try:
        with np.errstate(all="ignore"):  # as while training: NaN and infinity are what is looked for
            findings = replay(written(), engine)
        for finding in findings:
            store.append_events(encode_event("finding", finding.to_json()))
        store.finish("finished")
    finally:
        store.release()
    return Path(path)


def import_tensorboard(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    gradients: Callable[[str], str | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a run out of the scalars in TensorBoard event files; arguments and errors as in `import_csv`.

    Args:
        source: The directory of the event files.
        path: The run directory to write.
        gradients: Says for a tag which parameter's gradient norm it holds.
        overwrite: Replace a run that is there.
    """
    import pandas as pd

    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise MissingDependencyError.of("tensorboard", extra="tensorboard") from error
    if not Path(source).exists():
        raise RunNotFoundError(f"{source} does not exist")
    events = EventAccumulator(str(source), size_guidance={"scalars": 0}).Reload()
    columns = {}
    for tag in events.Tags()["scalars"]:
        found = events.Scalars(tag)
        series = pd.Series([e.value for e in found], index=[e.step for e in found])
        columns[tag] = series[~series.index.duplicated(keep="last")]
    table = pd.DataFrame(columns).rename_axis("step").reset_index()
    return import_frame(table, path, gradients=gradients, overwrite=overwrite, origin=f"tensorboard: {source}")


def _step_column(table: pd.DataFrame, step: str | None) -> Any:
    if step is not None and step not in table.columns:
        raise ConfigurationError.of("step", f"one of the columns {', '.join(map(str, table.columns[:10]))}", step)
    column = step or next((name for name in STEP_COLUMNS if name in table.columns), None)
    if column is not None and not _is_numeric(table[column]):
        raise ConfigurationError(f"the column {column!r}, which counts steps, holds something else than numbers")
    if column is not None and (table[column] < 0).any():
        raise ConfigurationError.of(str(column), ">= 0", table[column].min())
    return column


def _parameter_of(column: str) -> str | None:
    prefix = next((prefix for prefix in GRADIENT_PREFIXES if column.startswith(prefix)), None)
    return column.removeprefix(prefix) or None if prefix else None


def _statistic_of(column: str, norms: Mapping[str, Any]) -> tuple[str, str] | None:
    """The statistic and the parameter of a column such as `weight_norm/fc.weight`."""
    statistic, _, name = column.partition("/")
    return (statistic, name) if statistic in PARAMETER_STATISTICS and name in norms else None


def _is_numeric(column: pd.Series[Any]) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_numeric_dtype(column))


@dataclass(frozen=True)
class _Columns:
    """What the columns of a table are.

    Args:
        parameters: In order.
        norms: Parameter to the column of its gradient norm.
        sampled: Column to the statistic and parameter that it holds.
        numeric: Columns of numbers that are no gradient norms.
    """

    parameters: tuple[Parameter, ...]
    norms: Mapping[str, str]
    sampled: Mapping[str, tuple[str, str]]
    numeric: tuple[str, ...]


def _batch(table: pd.DataFrame, steps: Any, columns: _Columns) -> StepBatch:
    """A piece of the table. An empty field is "not measured": a table cannot say that a number was NaN."""
    parameters, sampled = columns.parameters, columns.sampled
    values = [_numbers(table[name], np.float32) for name in columns.norms.values()]
    place = {parameter.name: i for i, parameter in enumerate(parameters)}
    statistics = {}
    for statistic in dict.fromkeys(statistic for statistic, _ in sampled.values()):
        dense = np.full((len(table), len(parameters)), NOT_MEASURED, np.float32)
        for column, (of, name) in sampled.items():
            if of == statistic:
                dense[:, place[name]] = _numbers(table[column], np.float32)
        rows = np.flatnonzero((dense != NOT_MEASURED).any(axis=1))
        statistics[statistic] = Samples(rows, dense[rows])
    return StepBatch(
        parameters=parameters,
        step=np.asarray(steps, np.int64),
        grad_norm=np.stack(values, axis=1) if values else np.empty((len(table), 0), np.float32),
        metrics={_METRIC_NAMES.get(n, n): _numbers(table[n], np.float64) for n in columns.numeric if n not in sampled},
        statistics={name: samples for name, samples in statistics.items() if len(samples.rows)},
        stage=_codes(table, "stage", STAGES),
        skip_reason=_codes(table, "skip_reason", SKIP_REASONS),
    )


def _numbers(column: pd.Series[Any], dtype: Any) -> Any:
    """The numbers of a column; text that is no number is absent, as an empty field is."""
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    return np.where(np.isnan(values), NOT_MEASURED, values).astype(dtype)


def _codes(table: pd.DataFrame, name: str, words: tuple[str, ...]) -> Any:
    if name not in table.columns:
        return np.zeros(len(table), np.int8)
    return np.array([words.index(word) if word in words else 0 for word in table[name]], np.int8)
