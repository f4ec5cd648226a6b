"""The gradient norm over the depth of the model at chosen steps: a slope is a vanishing or exploding gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradwatch.reporters import style, words
from gradwatch.reporters.binning import Array
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.story import Chapter

#: From this factor a layer on the fit is called steep: about 0.3 nat a layer.
STEEP = 1.35


def depth_profile(
    digest: Digest,
    *,
    steps: Sequence[int] | None = None,
    root: Chapter | None = None,
    theme: str = "light",
    fig: Any = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the norm of each layer over depth, one line per step.

    Args:
        digest: The run at the resolution of the picture.
        steps: Which steps; by default the first, the last, three between, and the onset of the trouble.
        root: The chapter that the verdict is about.
        theme: `light` or `dark`.
        fig: Figure or SubFigure to draw on; a new one by default.
        ax: Axes to draw on; new ones by default.

    Returns:
        The figure. The dashed line is the straight line that fits the last step's logarithms best.
    """
    look = style.theme_of(theme)
    if ax is None:
        ax = style.canvas((9.0, 4.2), theme=look, fig=fig).subplots()
    stage = digest.stages[0].replace("_", "-") if digest.stages else "pre-clip"
    style.dress(ax, look, xlabel="layer, input → output", ylabel=f"gradient norm (L2, {stage})")
    rows = chosen_bins(digest, steps, root) if len(digest) and digest.layers else []
    if not rows:
        style.note(ax, "No finite gradient norm has been recorded.", look)
        return ax.figure  # type: ignore[return-value]
    norms = digest.norms.striking()[rows]
    colours = matplotlib.colormaps["viridis"](np.linspace(0.12, 0.88, len(rows)))
    entries: list[tuple[Any, str]] = []
    places = np.arange(len(digest.layers))
    for row, line, colour in zip(rows, norms, colours, strict=True):
        onset = root is not None and digest.first[row] <= root.first_step <= digest.last[row]
        shade = look.severity[root.severity] if onset and root else colour
        marker = "o" if len(places) <= 40 else None
        visible = np.where(line > 0, line, np.nan)
        (drawn,) = ax.plot(places, visible, color=shade, lw=2.2 if onset else 1.4, marker=marker, ms=3.5)
        entries.append((drawn, f"step {words.step(int(digest.first[row]))}{' (onset)' if onset else ''}"))
    style.log_axis(ax, norms[np.isfinite(norms)])
    fit = slope(norms[-1])
    if fit is not None:
        factor, line = fit
        (drawn,) = ax.plot(places, line, color=look.ink, lw=1, ls="--")
        steep = "  steep" if max(factor, 1 / factor) >= STEEP else ""
        entries.append((drawn, f"fit: ×{words.number(1 / factor)} per layer towards the input{steep}"))
    ax.set_xlim(-0.5, len(places) - 0.5)
    style.layer_axis(ax, digest.layers, most=12)
    ax.grid(visible=True, color=look.faint, lw=0.5, alpha=0.6)
    style.legend(ax, look, entries, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax.figure  # type: ignore[return-value]


def chosen_bins(digest: Digest, steps: Sequence[int] | None = None, root: Chapter | None = None) -> list[int]:
    """The bins of the given steps, or the first, the last, three between and the onset; ascending, each once."""
    if steps is None:
        measured = np.flatnonzero(np.isfinite(digest.norms.mid).any(axis=1))
        if not len(measured):
            return []
        places = measured[np.linspace(0, len(measured) - 1, 5).round().astype(int)]
        steps = [int(s) for s in digest.first[places]] + ([root.first_step] if root else [])
    rows = np.clip(np.searchsorted(digest.last, np.asarray(steps)), 0, len(digest) - 1)
    return sorted(set(rows.tolist()))


def slope(norms: Array) -> tuple[float, Array] | None:
    """Least squares line through the logarithms of the norms over depth.

    Returns:
        The factor from one layer to the next, and the line, shape (l,); None with fewer than three positive norms.
    """
    usable = np.isfinite(norms) & (norms > 0)
    if usable.sum() < 3:
        return None
    places = np.arange(len(norms))
    gradient, start = np.polyfit(places[usable], np.log(norms[usable]), 1)
    return float(np.exp(gradient)), np.exp(start + gradient * places)
