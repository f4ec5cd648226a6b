"""The suites by name."""

from __future__ import annotations

from pathlib import Path

from benchmarks.casework.case import Case
from benchmarks.casework.published import DIRECTORY, published_cases


def all_cases(directory: Path = DIRECTORY) -> list[Case]:
    """Every case of every suite."""
    return published_cases(directory)
