"""`load`, `compare` and `Run`: the record of a run together with everything that can be made from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.errors import ConfigurationError
from gradwatch.reader import RunReader

if TYPE_CHECKING:
    from gradwatch.reporters.compared import Comparison
    from gradwatch.reporters.live import Live
    from gradwatch.reporters.plots import Plots
    from gradwatch.reporters.summary import Summary


class Run(RunReader):
    """A run, opened for reading: also while it is being written, and after a crash.

    Adds to what `RunReader` reads the summary, the figures and the report. Shows its verdict in a notebook.

    Args:
        path: The run directory.

    Raises:
        RunNotFoundError: When there is no run.
        RunFormatError: When there is something else, or a run of a newer version.
        RunCorruptError: When nothing of it can be read.
    """

    @property
    def plot(self) -> Plots:
        """The figures: `run.plot.heatmap()` and others, each a matplotlib Figure."""
        from gradwatch.reporters.plots import Plots

        return Plots(self)

    def summary(self) -> Summary:
        """The verdict: what happened first, where, since when, why, what was done, did it help, what to do now."""
        from gradwatch.reporters.summary import summarize

        return summarize(self)

    def report(self, path: str | os.PathLike[str] | None = None, format: str | None = None) -> Path:  # noqa: A002
        """Write the report as one file.

        Args:
            path: Where to; by default `report.html` (or `.md`, `.json`) in the run's directory.
            format: `html`, `md` or `json`; by default what the path ends in, else `html`.

        Returns:
            The path of the file.

        Raises:
            ConfigurationError: An unknown format, or a path where nothing can be written.
        """
        from gradwatch.reporters.output import write_report

        return write_report(self, path, format)

    def live(self, *, every: float = 2.0) -> Live:
        """The summary in a notebook, renewed in place while a cell runs, until the run ends.

        Args:
            every: Seconds between two looks.

        Raises:
            ConfigurationError: `every` is not above 0.
        """
        from gradwatch.reporters.live import Live

        return Live(self, every=every)

    def __repr__(self) -> str:
        return (
            f"<Run {str(self.path)!r}: {self.info.status}, {len(self):,d} steps, {len(self.finding_list())} findings>"
        )

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def load(path: str | os.PathLike[str]) -> Run:
    """Open a run.

    Args:
        path: The directory that `watch(run_dir=...)` wrote, or is writing.

    Raises:
        RunNotFoundError: When there is no run.
        RunFormatError: When there is something else, or a run of a newer version.
        RunCorruptError: When nothing of it can be read.

    Examples:
        >>> run = load("runs/mnist")  # doctest: +SKIP
        >>> print(run.summary())  # doctest: +SKIP
    """
    return Run(path)


def compare(runs: Sequence[RunReader | str | os.PathLike[str]], *, by: str = "step") -> Comparison:
    """Hold runs against each other.

    Args:
        runs: Two or more runs, or their paths. The first is what the others are held against.
        by: What the runs are aligned on: `step`, or `time` since each run's start.

    Raises:
        ConfigurationError: Fewer than two runs, or another `by`.

    Examples:
        >>> compare(["runs/base", "runs/clipped"]).report("compare.html")  # doctest: +SKIP
    """
    from gradwatch.reporters.compared import Comparison

    if len(runs) < 2:
        raise ConfigurationError.of("runs", "two or more runs", list(map(str, runs)))
    return Comparison([run if isinstance(run, RunReader) else Run(run) for run in runs], by=by)
