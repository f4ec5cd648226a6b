"""Writes a table of the record as CSV, Parquet or JSON lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import MODULE_STATISTICS, PARAMETER_STATISTICS

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.reader import RunReader

FORMATS = ("csv", "parquet", "jsonl")
TABLES = ("grad_norms", "metrics", "parameters", "findings", "actions")


def write_table(
    run: RunReader, what: str, path: Path | None = None, *, format_name: str | None = None, by: str = "parameter"
) -> Path | None:
    """Write one table.

    Args:
        run: The run.
        what: One of `TABLES`, or the name of a statistic.
        path: Where to; standard output by default.
        format_name: One of `FORMATS`; by default what the path ends in, else CSV.
        by: `parameter` or `layer`, for the gradient norms.

    Returns:
        The path.

    Raises:
        UnknownNameError: There is no such table or format.
        ConfigurationError: Parquet to standard output, or a path where nothing can be written.
    """
    kind = format_name or ((path.suffix.removeprefix(".") or "csv") if path else "csv")
    if kind not in FORMATS:
        raise UnknownNameError.among("table format", kind, FORMATS)
    if path is None and kind == "parquet":
        raise ConfigurationError.of("--out", "given for Parquet, which is no text", None)
    table = frame(run, what, by)
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            table.to_parquet(path)
        elif kind == "csv":
            table.to_csv(sys.stdout if path is None else path)
        else:
            table.reset_index().to_json(sys.stdout if path is None else path, orient="records", lines=True)
    except OSError as error:
        if path is None:
            raise
        raise ConfigurationError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path


def frame(run: RunReader, what: str, by: str = "parameter") -> pd.DataFrame:
    """The table of this name."""
    if what == "grad_norms":
        return run.grad_norms(by=by)
    if what in TABLES:
        table: pd.DataFrame = getattr(run, what)()
        return table
    if what in PARAMETER_STATISTICS + MODULE_STATISTICS:
        return run.statistic(what)
    raise UnknownNameError.among("table", what, (*TABLES, *PARAMETER_STATISTICS, *MODULE_STATISTICS))
