"""Loss, global norm and learning rate against steps, with findings as spans and actions as marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradwatch.records import ActionRecord
from gradwatch.reporters import style, words
from gradwatch.reporters.binning import Array, Band
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.story import Chapter
from gradwatch.reporters.style import Theme

#: The loss is drawn on a logarithmic axis from this factor between its extremes on.
SPREAD = 20.0
#: The learning rate where its usual value is less than a hundredth of the largest: a linear axis would show it as zero,
#: but decay to zero is read on a linear one.
LR_SPREAD = 100.0


def timeline(
    digest: Digest,
    chapters: Sequence[Chapter] = (),
    actions: Sequence[ActionRecord] = (),
    *,
    root: Chapter | None = None,
    theme: str = "light",
    fig: Any = None,
) -> Figure:
    """Draw the run's metrics, one panel each, over the same steps.

    Args:
        digest: The run at the resolution of the picture.
        chapters: Findings to shade.
        actions: Actions to mark.
        root: The chapter that the verdict is about; named in the top panel.
        theme: `light` or `dark`.
        fig: Figure or SubFigure to draw on; a new one by default.

    Returns:
        The figure. Bands reach from the smallest to the largest value between two pixels, so no spike is lost.
    """
    look = style.theme_of(theme)
    panels = [(name, label) for name, label in (("loss", "loss"), ("lr", "learning rate")) if digest.metric(name)]
    panels.insert(min(1, len(panels)), ("global_norm", "global gradient norm"))
    figure = style.canvas((10.0, 0.8 + 1.9 * len(panels)), theme=look, fig=fig)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, label) in zip(axes, panels, strict=True):
        style.dress(ax, look, ylabel=label)
        if not len(digest) or digest.metric(name) is None:
            style.note(ax, f"No {label} was recorded.", look)
            continue
        _panel(ax, digest, name, look)
        _spans(ax, digest, chapters, look)
        for step in {a.step for a in actions if not a.dry_run}:
            ax.axvline(step, color=look.action, lw=0.9, ls=":", zorder=1)
    style.dress(axes[-1], look, xlabel="step", ylabel=panels[-1][1])
    if len(digest):
        style.step_axis(axes[-1])
        axes[-1].set_xlim(digest.edges[0], digest.edges[-1])
        _names(axes[0], root, actions, look)
    return figure  # type: ignore[no-any-return]


def middles(digest: Digest) -> Array:
    """The middle step of each bin."""
    return (digest.first + digest.last) / 2.0


def draw_band(ax: Axes, x: Array, band: Band, colour: str, *, lw: float = 1.4, ls: str = "-") -> Line2D:
    """A line through the medians in a band from the smallest to the largest value."""
    if np.nanmax(np.abs(band.high - band.low), initial=0) > 0:
        ax.fill_between(x, band.low, band.high, color=colour, alpha=0.25, lw=0)
        ax.vlines(x, band.low, band.high, color=colour, lw=np.where(band.is_striking(), 1.4, 0))
    (line,) = ax.plot(x, band.mid, color=colour, lw=lw, ls=ls, marker="o" if len(x) == 1 else None)
    return line


def _panel(ax: Axes, digest: Digest, name: str, theme: Theme) -> None:
    x, band = middles(digest), digest.metric(name)
    assert band is not None
    main = draw_band(ax, x, band, theme.lines[0 if name == "loss" else 1 if name == "global_norm" else 2])
    entries: list[tuple[Any, str]] = []
    values = [band.low, band.high]
    if name == "global_norm":
        after = digest.metric("post_clip_norm")
        if after is not None:
            entries.append((main, "before clipping"))
            entries.append((draw_band(ax, x, after, theme.lines[5], ls="--"), "after clipping"))
            values.append(after.low)
    factor = digest.metric("lr_factor")
    if name == "lr" and factor is not None and np.nanmin(factor.low) < 1:
        entries.append((main, "scheduler's"))
        lowered = Band(band.low * factor.low, band.mid * factor.mid, band.high * factor.high)
        entries.append((draw_band(ax, x, lowered, theme.lines[3], ls="--"), "with gradwatch's factor"))
        values.append(lowered.low)
    everything = np.concatenate(values)
    finite = everything[np.isfinite(everything)]
    if finite.size and (finite.min() > 0 if name == "global_norm" else reads_logarithmic(name, band)):
        style.log_axis(ax, finite)
    skipped = digest.metric("skipped")
    if skipped is not None and (skipped.high > 0).any() and name == "global_norm":
        where = x[skipped.high > 0]
        (rug,) = ax.plot(
            where, np.full(len(where), 0.03), "|", ms=6, color=theme.ink, transform=ax.get_xaxis_transform()
        )
        entries.append((rug, "skipped step"))
    ax.grid(visible=True, axis="y", color=theme.faint, lw=0.5, alpha=0.6)
    style.legend(ax, theme, entries, loc="best", ncols=len(entries))


def reads_logarithmic(name: str, band: Band) -> bool:
    """Whether a logarithmic axis shows this metric better than a linear one."""
    low, high = np.nanmin(band.low), np.nanmax(band.high)
    if name == "lr":
        return bool(low > 0 and high > LR_SPREAD * np.nanmedian(band.mid))
    return bool(low > 0 and high > SPREAD * low)


def _spans(ax: Axes, digest: Digest, chapters: Sequence[Chapter], theme: Theme) -> None:
    least = 0.003 * (digest.edges[-1] - digest.edges[0])
    for chapter in chapters:
        if chapter.severity == "info":
            continue
        stop = digest.edges[-1] if chapter.is_open else chapter.last_step + 0.5
        stop = max(stop, chapter.first_step + least)
        ax.axvspan(chapter.first_step - 0.5, stop, color=theme.severity[chapter.severity], alpha=0.13, lw=0)


def _names(ax: Axes, root: Chapter | None, actions: Sequence[ActionRecord], theme: Theme) -> None:
    if root is not None:
        ax.set_title(
            f"{root.phrase}, step {words.step(root.first_step)}", loc="left", fontsize=9, fontweight="bold",
            color=theme.severity[root.severity], parse_math=False,
        )  # fmt: skip
    done = sorted({a.action for a in actions if not a.dry_run})
    if done:
        ax.set_title(f"⋮ {words.listing(done)}", loc="right", fontsize=9, color=theme.action, parse_math=False)
