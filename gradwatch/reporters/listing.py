"""The runs under a directory, each in one row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradwatch.errors import RunError
from gradwatch.reporters import words
from gradwatch.reporters.summary import summarize
from gradwatch.reporters.verdict import State

#: How deep below the root runs are looked for.
MOST_DEEP = 6


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run of a list.

    Args:
        name: Path below the root.
        path: Where it is.
        state: Its verdict in one word.
        status: running, finished or crashed.
        steps: How many are recorded.
        loss: The last finite loss.
        worst: The verdict's headline, why it crashed, or why it cannot be read; empty for a run that is well.
        severity: Of the worst finding; empty without one.
        heartbeat: Unix time of the last sign of life.
    """

    name: str
    path: Path
    state: State
    status: str
    steps: int = 0
    loss: float | None = None
    worst: str = ""
    severity: str = ""
    heartbeat: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The row as JSON types."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def find_runs(root: Path) -> Iterator[Path]:
    """Directories at or under `root` that hold a run, in order of name; links are not followed."""
    pending = [(root, 0)]
    while pending:
        place, depth = pending.pop()
        if (place / "run.json").is_file():
            yield place
        elif depth < MOST_DEEP:
            below = sorted((p for p in _children(place) if p.is_dir() and not p.is_symlink()), reverse=True)
            pending += [(p, depth + 1) for p in below if not p.name.startswith(".")]


def describe(path: Path, root: Path) -> RunRow:
    """The row of the run at `path`; one that cannot be read says why."""
    from gradwatch.reader import RunReader

    name = words.visible(path.name if path == root else str(path.relative_to(root)))
    try:
        summary = summarize(RunReader(path))
    except RunError as error:
        return RunRow(name, path, "unjudged", "unreadable", worst=words.visible(str(error)), severity="warning")
    return RunRow(
        name, path, summary.verdict.state, summary.status, summary.numbers.steps,
        loss=summary.numbers.loss[1] if summary.numbers.loss else None,
        worst=summary.verdict.headline if summary.root else words.visible(summary.info.status_detail),
        severity=summary.root.severity if summary.root else "",
        heartbeat=summary.info.heartbeat,
    )  # fmt: skip


def _children(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except OSError:
        return []
