"""The size of the updates relative to the weights, against the band in which training usually goes well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gradwatch.reporters import style, words
from gradwatch.reporters.style import Theme

#: Updates of about a thousandth of the weights are usual (CS231n, "Ratio of weights:updates"); a decade around it.
HEALTHY = (1e-4, 1e-2)
MOST_NAMED = 4


def update_ratio(ratios: pd.DataFrame, *, theme: str = "light", fig: Any = None, ax: Axes | None = None) -> Figure:
    """Draw the update ratio of all parameters as a band, and by name those farthest outside the healthy band.

    Args:
        ratios: Index step (the sampled ones), one column per parameter: ‖Δw‖/‖w‖.
        theme: `light` or `dark`.
        fig: Figure or SubFigure to draw on; a new one by default.
        ax: Axes to draw on; new ones by default.

    Returns:
        The figure.
    """
    look = style.theme_of(theme)
    if ax is None:
        ax = style.canvas((10.0, 4.0), theme=look, fig=fig).subplots()
    style.dress(ax, look, xlabel="step", ylabel="update ratio ‖Δw‖ / ‖w‖")
    values = ratios.to_numpy(np.float64)
    positive = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    sampled = ~np.isnan(positive).all(axis=1)
    if not sampled.any():
        style.note(ax, "No update ratio was sampled.", look)
        return ax.figure  # type: ignore[return-value]
    steps, positive = ratios.index.to_numpy()[sampled], positive[sampled]
    bands = np.nanquantile(positive, (0.05, 0.5, 0.95), axis=1)
    style.log_axis(ax, [*positive[np.isfinite(positive)], *HEALTHY])
    ax.axhspan(*HEALTHY, color=look.lines[2], alpha=0.13, lw=0)
    ax.fill_between(steps, bands[0], bands[2], color=look.lines[0], alpha=0.25, lw=0)
    (median,) = ax.plot(steps, bands[1], color=look.lines[0], lw=1.8, marker="o" if len(steps) == 1 else None)
    entries: list[tuple[Any, str]] = [
        (Patch(fc=look.lines[2], alpha=0.3), "usual: 1e-4 to 1e-2"), (median, "median parameter"),
        (Patch(fc=look.lines[0], alpha=0.3), "middle 90 % of parameters"),
    ]  # fmt: skip
    entries += _outsiders(ax, steps, positive, list(ratios.columns), look)
    style.step_axis(ax)
    ax.grid(visible=True, axis="y", color=look.faint, lw=0.5, alpha=0.6)
    style.legend(ax, look, entries, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax.figure  # type: ignore[return-value]


def _outsiders(ax: Axes, steps: Any, positive: Any, names: list[Any], theme: Theme) -> list[tuple[Any, str]]:
    """Lines of the parameters whose median lies farthest outside the healthy band."""
    measured = np.flatnonzero(~np.isnan(positive).all(axis=0))
    middle = np.log10(np.nanmedian(positive[:, measured], axis=0))
    beyond = np.maximum(np.log10(HEALTHY[0]) - middle, middle - np.log10(HEALTHY[1]))
    worst = [int(i) for i in np.argsort(-beyond, kind="stable")[:MOST_NAMED] if beyond[i] > 0]
    entries = []
    for i, colour in zip(worst, (theme.lines[1], theme.lines[3], theme.lines[4], theme.lines[5]), strict=False):
        (line,) = ax.plot(steps, positive[:, measured[i]], color=colour, lw=1.1)
        entries.append((line, words.shorten(str(names[measured[i]]), 30)))
    return entries
