"""How a layer's gradient norm is spread from step to step: quantile bands over time, one panel a layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gradwatch.reporters import style, words
from gradwatch.reporters.style import Theme

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WINDOWS = 80


def distribution(norms: pd.DataFrame, *, stage: str = "pre-clip", theme: str = "light", fig: Any = None) -> Figure:
    """Draw the median, the middle half and the middle nine tenths of each layer's norm in windows of steps.

    Args:
        norms: Index step, one column per layer; a few layers.
        stage: Where the norms were taken.
        theme: `light` or `dark`.
        fig: Figure or SubFigure to draw on; a new one by default.

    Returns:
        The figure.
    """
    look = style.theme_of(theme)
    columns = min(3, max(1, norms.shape[1]))
    rows = max(1, math.ceil(norms.shape[1] / columns))
    figure = style.canvas((3.4 * columns + 0.6, 2.2 * rows + 0.8), theme=look, fig=fig)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    if norms.empty:
        style.note(style.dress(axes[0, 0], look), "No step has been recorded.", look)
        return figure  # type: ignore[no-any-return]
    steps = norms.index.to_numpy()
    limits: list[float] = []
    for ax, name in zip(axes.flat, norms.columns, strict=False):
        style.dress(ax, look)
        ax.set_title(words.shorten(str(name), 30), fontsize=9, color=look.ink, loc="left", parse_math=False)
        limits += _panel(ax, steps, norms[name].to_numpy(np.float64), look)
    for ax in axes.flat[norms.shape[1] :]:
        ax.set_visible(False)
    for ax in axes.flat:
        style.log_axis(ax, limits)
        style.step_axis(ax, most=4)
    figure.supxlabel("step", fontsize=9, color=look.ink)
    figure.supylabel(f"gradient norm (L2, {stage})", fontsize=9, color=look.ink)
    colour = look.lines[0]
    entries: list[tuple[Any, str]] = [
        (Patch(fc=colour, alpha=0.2), "middle 90 %"), (Patch(fc=colour, alpha=0.5), "middle 50 %"),
        (Patch(fc=colour), "median"),
    ]  # fmt: skip
    style.legend(axes[0, 0], look, entries, loc="best")
    return figure  # type: ignore[no-any-return]


def windows(values: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.float64]:
    """Quantiles of the finite values in n windows of equally many rows, shape (n, 5); NaN where there is none."""
    found = np.full((n, len(QUANTILES)), np.nan)
    for row, part in enumerate(np.array_split(values, n)):
        finite = part[np.isfinite(part)]
        if finite.size:
            found[row] = np.quantile(finite, QUANTILES)
    return found


def _panel(ax: Axes, steps: npt.NDArray[Any], values: npt.NDArray[np.float64], theme: Theme) -> list[float]:
    n = min(WINDOWS, max(1, len(values) // 10), len(values))
    bands = windows(values, n)
    x = np.array([part.mean() for part in np.array_split(steps, n)])
    colour = theme.lines[0]
    ax.fill_between(x, bands[:, 0], bands[:, 4], color=colour, alpha=0.2, lw=0)
    ax.fill_between(x, bands[:, 1], bands[:, 3], color=colour, alpha=0.35, lw=0)
    ax.plot(x, bands[:, 2], color=colour, lw=1.4, marker="o" if n == 1 else None)
    return [float(v) for v in bands[np.isfinite(bands)]]
