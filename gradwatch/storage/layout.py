"""Names: of the columns in a segment, and of the files in a run directory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from gradwatch.errors import RunFormatError
from gradwatch.records import FORMAT_VERSION, MODULE_STATISTICS, PARAMETER_STATISTICS, StepBatch

RUN_FILE = "run.json"
EVENTS_FILE = "events.jsonl"
LOCK_FILE = "writer.lock"
STEPS, SAMPLES, ROLLUPS = "steps", "samples", "rollups"
OPEN_SUFFIX, SEALED_SUFFIX, TEMPORARY_SUFFIX, DAMAGED_SUFFIX = ".arrow", ".parquet", ".tmp", ".damaged"

#: Key of the schema metadata under which a segment describes itself.
METADATA_KEY = b"gradwatch"
#: Columns that are not metrics.
FIXED_COLUMNS = ("step", "stage", "skip_reason")
GRAD_NORM = "grad_norm"
_STATISTICS = frozenset(PARAMETER_STATISTICS + MODULE_STATISTICS)
_STEM = re.compile(r"(\d{6,})-(\d{12,})")


@dataclass(frozen=True, slots=True, order=True)
class Stem:
    """Name of a segment: its place in the order of writing, and the first step it answers for.

    A step counts only in the last segment that answers for it: a run that was resumed at an earlier step supersedes the
    steps from there on.

    Examples:
        >>> str(Stem(3, 1500))
        '000003-000000001500'
    """

    sequence: int
    first: int

    def __str__(self) -> str:
        return f"{self.sequence:06d}-{self.first:012d}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The stem that `text` spells, or None."""
        match = _STEM.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match else None


def metric_column(name: str) -> str:
    """Column of a metric: its name, below `metric/` where that name means another column."""
    head, slash, _ = name.partition("/")
    reserved = name in FIXED_COLUMNS or name == GRAD_NORM or (slash and (head in _STATISTICS or head == "metric"))
    return f"metric/{name}" if reserved or name in _STATISTICS else name


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of one segment.

    Args:
        parameters: Names of the p parameters.
        modules: Names of the m modules.
        metrics: Names of the metrics, sorted.
        statistics: Names of the sampled statistics, sorted; `grad_norm` is always there and not among them.
    """

    parameters: tuple[str, ...]
    modules: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    @classmethod
    def of(cls, batch: StepBatch) -> Self:
        """The least layout that holds the batch."""
        names = tuple(parameter.name for parameter in batch.parameters)
        return cls(names, batch.modules, tuple(sorted(batch.metrics)), tuple(sorted(batch.statistics)))

    def joined(self, other: Layout) -> Layout | None:
        """The layout that holds both; None when they differ in parameters or modules."""
        if self.parameters != other.parameters or (self.modules != other.modules and self.modules and other.modules):
            return None
        if self == other:
            return self
        metrics = tuple(sorted({*self.metrics, *other.metrics}))
        statistics = tuple(sorted({*self.statistics, *other.statistics}))
        return Layout(self.parameters, self.modules or other.modules, metrics, statistics)

    def names(self, statistic: str) -> tuple[str, ...]:
        """What the values of a statistic belong to: parameters, or modules."""
        return self.modules if statistic in MODULE_STATISTICS else self.parameters

    def columns(self, statistic: str, names: Iterable[str] | None = None) -> list[str]:
        """Columns of a statistic in a sealed segment."""
        return [f"{statistic}/{name}" for name in (self.names(statistic) if names is None else names)]

    def metadata(self) -> dict[bytes, bytes]:
        """The layout as schema metadata."""
        fields = {
            "format_version": FORMAT_VERSION,
            "parameters": self.parameters,
            "modules": self.modules,
            "metrics": self.metrics,
            "statistics": self.statistics,
        }
        return {METADATA_KEY: json.dumps(fields).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> Self:
        """The inverse of `metadata`.

        Raises:
            RunFormatError: When it is not ours, or of a newer version.
        """
        try:
            fields: dict[str, Any] = json.loads((metadata or {})[METADATA_KEY])
            check_version(fields["format_version"])
            names = {key: tuple(map(_text, fields[key])) for key in ("parameters", "modules", "metrics", "statistics")}
        except (KeyError, TypeError, ValueError) as error:
            raise RunFormatError("the segment was not written by gradwatch") from error
        return cls(**names)


def check_version(version: object) -> None:
    """Raise RunFormatError when a run has a format version that this gradwatch does not know."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RunFormatError(f"not a run of gradwatch: 'format_version' is {version!r}")
    if version > FORMAT_VERSION:
        known = f"this one reads up to {FORMAT_VERSION}"
        raise RunFormatError(f"the run was written by a newer gradwatch (format {version}, {known}): update gradwatch")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
