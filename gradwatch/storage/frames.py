"""DataFrames from the arrays of a run: `NOT_MEASURED` becomes NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradwatch.errors import UnknownNameError
from gradwatch.records import NOT_MEASURED, SKIP_REASONS, STAGES, ActionRecord, Finding, Ints, Layers, Parameter
from gradwatch.storage.rollups import Rollup

if TYPE_CHECKING:
    import pandas as pd

#: What a rollup holds of each bin.
AGGREGATES = ("mean", "minimum", "maximum", "count", "nonfinite")
_FINDING = (
    "rule", "severity", "first_step", "last_step", "layer", "parameter", "value", "threshold", "cause", "advice",
    "resolved_step",
)  # fmt: skip
_ACTION = ("step", "action", "layer", "detail", "reason", "before", "after", "outcome")


def check_aggregate(name: str) -> str:
    """The name; UnknownNameError when a rollup has nothing of that name."""
    if name not in AGGREGATES:
        raise UnknownNameError.among("aggregate", name, AGGREGATES)
    return name


def of_values(step: Ints, values: npt.NDArray[Any], names: Sequence[str]) -> pd.DataFrame:
    """One row per step; takes the array over."""
    import pandas as pd

    values[values == NOT_MEASURED] = np.nan
    return pd.DataFrame(values, index=pd.Index(step, name="step"), columns=_labels(names))


def _labels(names: Sequence[str]) -> pd.Index[Any]:
    import pandas as pd

    return pd.Index(list(names), dtype="object")


def of_rollup(rollup: Rollup, aggregate: str) -> pd.DataFrame:
    """One row per bin."""
    import pandas as pd

    index, columns = pd.Index(rollup.start, name="step"), _labels(rollup.names)
    return pd.DataFrame(getattr(rollup, aggregate), index=index, columns=columns)


def by_layer(rollup: Rollup, parameters: Sequence[Parameter], aggregate: str) -> pd.DataFrame:
    """One row per bin, columns of parameters put together to layers: roots of sums of squares, or sums of counts."""
    import pandas as pd

    layers, values = Layers(parameters), getattr(rollup, aggregate)
    if aggregate in ("count", "nonfinite"):
        of_layer = np.arange(len(layers))[:, None] == layers.of_parameter
        table = values @ of_layer.T
    else:
        table = _no_marker(layers.norms(np.where(np.isnan(values), NOT_MEASURED, values)))
    return pd.DataFrame(table, index=pd.Index(rollup.start, name="step"), columns=_labels(layers.names))


def _no_marker(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(values == NOT_MEASURED, np.nan, values)


def of_metrics(step: Ints, metrics: Mapping[str, npt.NDArray[Any]], *, stage: Ints, skip_reason: Ints) -> pd.DataFrame:
    """One row per step; a metric with the name of a column of words gets `metric/` before it."""
    import pandas as pd

    words = {
        "stage": pd.Categorical.from_codes(stage, categories=pd.Index(STAGES)),
        "skip_reason": pd.Categorical.from_codes(skip_reason, categories=pd.Index(SKIP_REASONS)),
    }
    columns = {f"metric/{name}" if name in words else name: _no_marker(values) for name, values in metrics.items()}
    return pd.DataFrame({**columns, **words}, index=pd.Index(step, name="step"))


def of_parameters(parameters: Sequence[Parameter]) -> pd.DataFrame:
    """One row per parameter."""
    import pandas as pd

    names = [field.name for field in dataclasses.fields(Parameter)] + ["size"]
    return pd.DataFrame([[getattr(p, name) for name in names] for p in parameters], columns=names).set_index("name")


def of_findings(findings: Sequence[Finding]) -> pd.DataFrame:
    """One row per finding."""
    import pandas as pd

    rows = [
        {
            **{name: getattr(f, name) for name in _FINDING if hasattr(f, name)},
            "layer": _first(f.layers),
            "parameter": _first(f.parameters),
            "advice": "; ".join(f.advice),
        }
        for f in findings
    ]
    return pd.DataFrame(rows, columns=list(_FINDING)).astype({"resolved_step": "Int64"})


def of_actions(actions: Sequence[ActionRecord]) -> pd.DataFrame:
    """One row per action."""
    import pandas as pd

    rows = [(a.step, a.action, ", ".join(a.layers), a.detail, a.reason, a.before, a.after, a.outcome) for a in actions]
    return pd.DataFrame(rows, columns=list(_ACTION))


def _first(names: Sequence[str]) -> str:
    return names[0] if names else ""
