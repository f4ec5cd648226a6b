"""Runs in one picture: loss and global norm of each, and the layers of the second against the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradwatch.reporters import style, words
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.figures.timeline import draw_band, middles

if TYPE_CHECKING:
    from gradwatch.reporters.comparison import Alignment


def comparison(compared: Alignment, *, theme: str = "light", fig: Any = None) -> Figure:
    """Draw a comparison.

    Args:
        compared: The runs.
        theme: `light` or `dark`.
        fig: Figure or SubFigure to draw on; a new one by default.

    Returns:
        The figure: one panel for the loss, one for the global norm, one for the ratio of the second run's layer norms
        to the first's where they have layers in common.
    """
    look = style.theme_of(theme)
    figure = style.canvas((10.0, 7.5), theme=look, fig=fig)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(3, 3, 4))
    for ax, name, label in ((top, "loss", "loss"), (middle, "global_norm", "global gradient norm")):
        style.dress(ax, look, xlabel="step" if compared.by == "step" else "seconds since the start", ylabel=label)
        _lines(ax, compared, name, look)
    style.dress(bottom, look, xlabel="step", ylabel="layer, input → output (downwards)")
    _ratios(bottom, compared, look)
    return figure  # type: ignore[no-any-return]


def _lines(ax: Axes, compared: Alignment, name: str, theme: style.Theme) -> None:
    entries: list[tuple[Any, str]] = []
    values = []
    colours = (*theme.lines, *theme.lines)
    for i, (label, digest) in enumerate(zip(compared.names, compared.digests, strict=True)):
        band = digest.metric(name) if len(digest) else None
        if band is None:
            continue
        x = middles(digest) if compared.by == "step" else compared.seconds(i)
        line = draw_band(ax, x, band, colours[i % len(colours)], ls=("-", "--", "-.", ":")[i // len(theme.lines) % 4])
        entries.append((line, words.shorten(label, 30)))
        values.append(np.concatenate([band.low, band.high]))
    if not entries:
        style.note(ax, f"No {name.replace('_', ' ')} was recorded.", theme)
        return
    finite = np.concatenate(values)
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
        style.log_axis(ax, finite)
    ax.grid(visible=True, axis="y", color=theme.faint, lw=0.5, alpha=0.6)
    style.step_axis(ax)
    style.legend(ax, theme, entries, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _ratios(ax: Axes, compared: Alignment, theme: style.Theme) -> None:
    first, second = compared.digests[:2]
    common = [name for name in first.layers if name in set(second.layers)]
    if not common or not len(first) or not len(second):
        style.note(ax, "The first two runs have no layer in common.", theme)
        return
    ratio = layer_ratio(first, second, common)
    limit = colour_limit(ratio)
    rows = np.arange(len(common) + 1) - 0.5
    cmap = matplotlib.colormaps["PuOr_r"].with_extremes(bad=theme.absent)
    image = ax.pcolormesh(
        first.edges, rows, np.ma.masked_invalid(ratio.T), vmin=-limit, vmax=limit, cmap=cmap, rasterized=True
    )
    ax.set_ylim(len(common) - 0.5, -0.5)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, fraction=0.05, aspect=20)
    ticks = np.array([-1, -0.5, 0, 0.5, 1]) * limit
    bar.set_ticks(ticks.tolist(), labels=[f"×{words.number(10**t)}" for t in ticks])
    bar.ax.tick_params(colors=theme.ink, labelsize=style.LABEL_POINTS)
    names = [words.shorten(name, 18) for name in compared.names[:2]]
    bar.set_label(f"norm of {names[1]} ÷ {names[0]}", color=theme.ink, fontsize=9, parse_math=False)
    bar.outline.set_visible(False)
    style.row_labels(ax, common, theme=theme)
    style.step_axis(ax)


def colour_limit(ratio: Any) -> float:
    """The logarithm to base 10 at which the colours end: of the largest ratio, at least 2 and at most a million."""
    largest = np.max(np.abs(ratio[np.isfinite(ratio)]), initial=0.0)
    return float(np.clip(largest, np.log10(2), 6.0))


def layer_ratio(first: Digest, second: Digest, layers: list[str]) -> Any:
    """Logarithm to base 10 of the second's norm over the first's, at the first's bins, shape (n, l)."""
    columns = [first.layers.index(name) for name in layers], [second.layers.index(name) for name in layers]
    rows = np.searchsorted(second.last, first.first)
    inside = rows < len(second)
    with np.errstate(divide="ignore", invalid="ignore"):
        ours, theirs = np.log10(first.norms.mid[:, columns[0]]), np.log10(second.norms.mid[:, columns[1]])
        ratio = theirs[np.minimum(rows, len(second) - 1)] - ours
    ratio[~inside] = np.nan
    return ratio
