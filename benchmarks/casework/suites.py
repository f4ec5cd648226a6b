"""The suites by name, and the halves that rules are developed and reported on."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.casework.case import Case
from benchmarks.casework.published import DIRECTORY, published_cases
from benchmarks.casework.scenarios import SCENARIOS

#: Another directory of specifications, such as cases that were held back.
CASES_VARIABLE = "GRADWATCH_BENCHMARK_CASES"


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every case of every suite."""
    published = published_cases(Path(os.environ.get(CASES_VARIABLE) or DIRECTORY))
    return (*published, *SCENARIOS.values())


@functools.cache
def _by_id() -> dict[str, Case]:
    return {case.id: case for case in all_cases()}


def case_by_id(name: str) -> Case:
    """The case of that id.

    Raises:
        KeyError: No such case.
    """
    return _by_id()[name]


def half(cases: Sequence[Case], which: str) -> list[Case]:
    """Every other case by id: `dev` (even places) to develop rules on, `held` (odd) to report them on, or `all`."""
    ordered = sorted(cases, key=lambda case: case.id)
    return {"dev": ordered[0::2], "held": ordered[1::2], "all": ordered}[which]
