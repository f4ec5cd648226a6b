"""Layers by depth against steps, coloured by the gradient norm: where and since when, in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from gradwatch.records import ActionRecord
from gradwatch.reporters import style, words
from gradwatch.reporters.binning import Array
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.story import Chapter
from gradwatch.reporters.style import Theme

#: Decades around the typical norm that the colours tell apart; beyond them the colour stays.
DECADES = 6
MOST_BOXES = 40


def heatmap(
    digest: Digest,
    chapters: Sequence[Chapter] = (),
    actions: Sequence[ActionRecord] = (),
    *,
    root: Chapter | None = None,
    theme: str = "light",
    fig: Any = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the layers' gradient norms.

    Args:
        digest: The run at the resolution of the picture.
        chapters: Findings to outline.
        actions: Actions to mark along the top.
        root: The chapter that the verdict is about; its onset is marked across.
        theme: `light` or `dark`.
        fig: Figure or SubFigure to draw on; a new one by default.
        ax: Axes to draw on; new ones by default.

    Returns:
        The figure.
    """
    look = style.theme_of(theme)
    if ax is None:
        height = float(np.clip(1.7 + 0.2 * len(digest.layers), 2.8, 8.0))
        ax = style.canvas((10.0, height), theme=look, fig=fig).subplots()
    stage = " and ".join(name.replace("_", "-") for name in digest.stages)
    style.dress(ax, look, xlabel="step", ylabel="layer, input → output (downwards)")
    if not len(digest) or not digest.layers:
        style.note(ax, "No step has been recorded.", look)
        return ax.figure  # type: ignore[return-value]
    shown = digest.norms.striking()
    scale = colour_scale(shown)
    image = _cells(ax, digest, shown, scale, look)
    _colour_bar(ax, image, shown, f"gradient norm (L2, {stage})", look)
    place = {name: row for row, name in enumerate(digest.layers)}
    worst = [place[name] for c in ([root] if root else []) for name in c.layers[:12] if name in place]
    style.row_labels(ax, digest.layers, theme=look, must=worst)
    style.step_axis(ax)
    _boxes(ax, digest, chapters, place, look)
    _onset(ax, digest, root, look)
    _action_marks(ax, actions, look)
    _key(ax, digest, shown, actions, look)
    return ax.figure  # type: ignore[return-value]


def colour_scale(norms: Array) -> LogNorm:
    """Logarithmic, from the smallest to the largest norm, at most `DECADES` around the median, at least two wide."""
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if not positive.size:
        return LogNorm(1e-3, 1.0)
    logs = np.log10(positive)
    middle = float(np.median(logs))
    low = max(float(logs.min()), middle - DECADES)
    high = min(float(logs.max()), middle + DECADES)
    if high - low < 2:
        low, high = (low + high) / 2 - 1, (low + high) / 2 + 1
    return LogNorm(10**low, 10**high)


def _cells(ax: Axes, digest: Digest, shown: Array, scale: LogNorm, theme: Theme) -> Any:
    rows = np.arange(len(digest.layers) + 1) - 0.5
    positive = np.ma.masked_invalid(np.where(shown > 0, shown, np.nan).T)
    options: dict[str, Any] = {"rasterized": True, "edgecolors": "none", "linewidth": 0, "antialiased": False}
    image = ax.pcolormesh(digest.edges, rows, positive, norm=scale, cmap=style.sequential(theme), **options)
    for mask, colour in ((shown == 0, theme.zero), (digest.nonfinite, theme.nonfinite)):
        if mask.any():
            flat = np.ma.masked_where(~mask.T, np.ones(mask.T.shape))
            ax.pcolormesh(digest.edges, rows, flat, cmap=style.flat(colour), **options)
    ax.set_xlim(digest.edges[0], digest.edges[-1])
    ax.set_ylim(len(digest.layers) - 0.5, -0.5)
    return image


def _colour_bar(ax: Axes, image: Any, shown: Array, label: str, theme: Theme) -> None:
    scale = image.norm
    lowest, highest = scale.vmin or 0.0, scale.vmax or 0.0
    finite = shown[np.isfinite(shown) & (shown > 0)]
    over = bool(finite.size) and bool(finite.max() > highest * 1.01)
    under = bool(finite.size) and bool(finite.min() < lowest / 1.01)
    extend = {(True, True): "both", (True, False): "max", (False, True): "min"}.get((over, under), "neither")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=30, fraction=0.05, extend=extend)
    decades = range(math.ceil(math.log10(lowest)), math.floor(math.log10(highest)) + 1)
    every = max(1, math.ceil(len(decades) / 7))
    bar.set_ticks([10.0**d for d in decades][::every], labels=[words.power(d) for d in decades][::every])
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=theme.ink, labelsize=style.LABEL_POINTS)
    bar.set_label(label, color=theme.ink, fontsize=9)
    bar.outline.set_visible(False)


def _boxes(ax: Axes, digest: Digest, chapters: Sequence[Chapter], place: dict[str, int], theme: Theme) -> None:
    """Outline what each finding concerns: neighbouring layers in one box, the gravest last so that it lies on top."""
    drawn = 0
    for chapter in sorted(chapters, key=lambda c: c.severity == "critical"):
        if chapter.severity == "info":
            continue
        start = max(chapter.first_step - 0.5, digest.edges[0])
        stop = digest.edges[-1] if chapter.is_open else min(chapter.last_step + 0.5, digest.edges[-1])
        least = 0.012 * (digest.edges[-1] - digest.edges[0])
        for top, bottom in spans([place[name] for name in chapter.layers if name in place]):
            if drawn >= MOST_BOXES:
                return
            spare = max(0.0, least - (stop - start))
            corner, width, height = (start - spare / 2, top - 0.5), stop - start + spare, bottom - top + 1
            for colour, thick in (("#ffffff", 3.2), (theme.severity[chapter.severity], 1.6)):
                ax.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, lw=thick, clip_on=True, zorder=4))
            drawn += 1


def spans(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring rows as (first, last).

    Examples:
        >>> spans([3, 1, 2, 7])
        [(1, 3), (7, 7)]
    """
    found: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if found and row == found[-1][1] + 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    return found


def _onset(ax: Axes, digest: Digest, root: Chapter | None, theme: Theme) -> None:
    """A line across the layers where the trouble began, and the words above it."""
    if root is None:
        return
    colour = theme.severity[root.severity]
    if root.is_open or root.last_step > root.first_step:
        ax.axvline(root.first_step, color=colour, lw=1.2, ls=(0, (4, 2)), zorder=5)
    left, right = digest.edges[0], digest.edges[-1]
    late = (root.first_step - left) > 0.5 * (right - left)
    text = f"{root.phrase}, step {words.step(root.first_step)}"
    text = f"{text} ▾" if late else f"▾ {text}"
    ax.annotate(
        text, (root.first_step, 1), xycoords=("data", "axes fraction"), xytext=(0, 10), textcoords="offset points",
        ha="right" if late else "left", va="bottom", color=colour, fontsize=9, fontweight="bold", parse_math=False,
        annotation_clip=False,
    )  # fmt: skip


def _action_marks(ax: Axes, actions: Sequence[ActionRecord], theme: Theme) -> None:
    steps = sorted({a.step for a in actions if not a.dry_run})
    if steps:
        heights = np.full(len(steps), 1.012)
        ax.plot(steps, heights, "D", ms=4, color=theme.action, transform=ax.get_xaxis_transform(), clip_on=False)


def _key(ax: Axes, digest: Digest, shown: Array, actions: Sequence[ActionRecord], theme: Theme) -> None:
    entries: list[tuple[Any, str]] = []
    if digest.nonfinite.any():
        entries.append((Patch(fc=theme.nonfinite), "NaN or inf"))
    if (shown == 0).any():
        entries.append((Patch(fc=theme.zero, ec=theme.faint), "exactly zero"))
    if (np.isnan(shown) & ~digest.nonfinite).any():
        entries.append((Patch(fc=theme.absent), "not measured"))
    if any(not a.dry_run for a in actions):
        entries.append((Line2D([], [], marker="D", ls="", ms=4, color=theme.action), "action"))
    style.legend(ax, theme, entries, loc="upper left", bbox_to_anchor=(0, -0.0), ncols=4, borderaxespad=4.0)
