"""How much of each module's output is saturated or dead, over depth and steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradwatch.reporters import style

WORDS = {"saturated_fraction": "saturated share of the outputs", "dead_fraction": "dead share of the outputs"}


def saturation(fractions: Mapping[str, pd.DataFrame], *, theme: str = "light", fig: Any = None) -> Figure:
    """Draw fractions between 0 and 1, modules by depth against steps; one panel per statistic.

    Args:
        fractions: `saturated_fraction`, `dead_fraction` or both to a frame: index step, one column per module.
        theme: `light` or `dark`.
        fig: Figure or SubFigure to draw on; a new one by default.

    Returns:
        The figure.
    """
    look = style.theme_of(theme)
    measured = {name: frame.dropna(axis=1, how="all") for name, frame in fractions.items()}
    drawn = {name: frame for name, frame in measured.items() if frame.size}
    rows = max((frame.shape[1] for frame in drawn.values()), default=4)
    height = float(np.clip(1.2 + 0.2 * rows, 2.4, 6.0)) * max(1, len(drawn))
    figure = style.canvas((10.0, height), theme=look, fig=fig)
    axes = figure.subplots(max(1, len(drawn)), 1, squeeze=False)[:, 0]
    if not drawn:
        style.note(
            style.dress(axes[0], look), "No activation statistic was sampled: watch(..., activations=True).", look
        )
    for ax, (name, frame) in zip(axes, drawn.items(), strict=False):
        style.dress(ax, look, xlabel="step", ylabel="module, input → output (downwards)")
        _panel(ax, frame, WORDS.get(name, name), theme)
    return figure  # type: ignore[no-any-return]


def _panel(ax: Axes, frame: pd.DataFrame, label: str, theme: str) -> None:
    look = style.theme_of(theme)
    steps = frame.index.to_numpy(np.float64)
    inner = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0] - 0.5], inner, [steps[-1] + 0.5]])
    values = np.ma.masked_invalid(frame.to_numpy(np.float64).T)
    rows = np.arange(frame.shape[1] + 1) - 0.5
    image = ax.pcolormesh(edges, rows, values, vmin=0, vmax=1, cmap=style.sequential(look), rasterized=True)
    ax.set_ylim(frame.shape[1] - 0.5, -0.5)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, fraction=0.05)
    bar.set_label(label, color=look.ink, fontsize=9)
    bar.ax.tick_params(colors=look.ink, labelsize=style.LABEL_POINTS)
    bar.outline.set_visible(False)
    worst = np.flatnonzero(np.nan_to_num(np.nanmean(values.filled(np.nan), axis=1)) > 0.5).tolist()
    style.row_labels(ax, [str(name) for name in frame.columns], theme=look, must=worst)
    style.step_axis(ax)
