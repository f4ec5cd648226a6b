"""What options of the command line can be chosen from."""

from __future__ import annotations

import enum


class Format(enum.StrEnum):
    """Formats of a report."""

    html = "html"
    md = "md"
    json = "json"


class Level(enum.StrEnum):
    """Severities of a finding."""

    info = "info"
    warning = "warning"
    critical = "critical"


class Theme(enum.StrEnum):
    """Colours of a figure."""

    light = "light"
    dark = "dark"


class By(enum.StrEnum):
    """What compared runs are aligned on."""

    step = "step"
    time = "time"


class Framework(enum.StrEnum):
    """Frameworks of the demo."""

    torch = "torch"
    keras = "keras"


class TableFormat(enum.StrEnum):
    """Formats of an exported table."""

    csv = "csv"
    parquet = "parquet"
    jsonl = "jsonl"
    tensorboard = "tensorboard"
