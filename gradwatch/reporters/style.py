"""Colours and dress of all figures: readable for the colour-blind, in light and dark, without global state."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gradwatch.errors import UnknownNameError
from gradwatch.reporters import words

#: Room of one line of tick label, in points.
LABEL_POINTS = 8.0


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of a figure.

    Args:
        paper: Background.
        ink: Text and axes.
        faint: Grid and less important text.
        lines: Colours of lines (Okabe and Ito 2008, distinguishable in all common kinds of colour blindness).
        severity: Severity to colour.
        action: Colour of actions.
        nonfinite: Colour of NaN and infinity in a heatmap.
        zero: Colour of an exact zero in a heatmap.
        absent: Colour of what was not measured in a heatmap.
    """

    paper: str
    ink: str
    faint: str
    lines: tuple[str, ...]
    severity: dict[str, str]
    action: str
    nonfinite: str
    zero: str
    absent: str


THEMES: dict[str, Theme] = {
    "light": Theme(
        paper="#ffffff", ink="#1c2430", faint="#c9d0d9",
        lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1c2430"),
        severity={"critical": "#c4122f", "warning": "#b36b00", "info": "#0072b2"},
        action="#007a5a", nonfinite="#ff3d1f", zero="#000000", absent="#eceff3",
    ),
    "dark": Theme(
        paper="#12161d", ink="#e6eaf0", faint="#3a4452",
        lines=("#56b4e9", "#f08c3a", "#2fc79a", "#e39bc3", "#f2c14e", "#8fd0f5", "#e6eaf0"),
        severity={"critical": "#ff6b7d", "warning": "#ffb547", "info": "#56b4e9"},
        action="#2fc79a", nonfinite="#ff5a3c", zero="#000000", absent="#262d38",
    ),
}  # fmt: skip


def theme_of(name: str) -> Theme:
    """The theme of this name.

    Raises:
        UnknownNameError: There is none of this name.
    """
    if name not in THEMES:
        raise UnknownNameError.among("theme", name, THEMES)
    return THEMES[name]


class Picture(Figure):
    """A matplotlib Figure that shows itself in a notebook and needs no pyplot."""

    def draw(self, renderer: Any) -> None:
        """Draw; a layer name in a script that the font lacks is drawn as a box, without a warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            super().draw(renderer)

    def png(self, dpi: float = 100) -> bytes:
        """The picture as PNG."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi, facecolor=self.get_facecolor())
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def canvas(size: tuple[float, float], *, theme: Theme, fig: Any = None) -> Any:
    """The figure to draw on: the caller's `fig`, or a new one of `size` in inches."""
    figure = Picture(figsize=size, layout="constrained") if fig is None else fig
    figure.set_facecolor(theme.paper)
    return figure


def dress(ax: Axes, theme: Theme, *, xlabel: str = "", ylabel: str = "", title: str = "") -> Axes:
    """Give the axes the theme's colours and their words; nothing in the words is read as mathematics."""
    ax.set_facecolor(theme.paper)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
    ax.tick_params(colors=theme.ink, which="both", labelsize=LABEL_POINTS, color=theme.faint)
    ax.set_xlabel(xlabel, color=theme.ink, fontsize=9, parse_math=False)
    ax.set_ylabel(ylabel, color=theme.ink, fontsize=9, parse_math=False)
    if title:
        ax.set_title(title, color=theme.ink, fontsize=11, loc="left", fontweight="bold", parse_math=False)
    return ax


def step_axis(ax: Axes, *, most: int = 7) -> None:
    """Whole steps, thousands separated, few enough to be read."""
    ax.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.step(int(value))))


def layer_axis(ax: Axes, layers: Sequence[str], *, most: int) -> None:
    """Names of layers below a horizontal axis of their places, at most so many, never between two layers."""
    ax.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _layer_label(layers, value)))
    for label in ax.get_xticklabels():
        label.set_parse_math(False)
    if max(map(len, layers), default=0) > 5:
        ax.tick_params(axis="x", rotation=30)
        for label in ax.get_xticklabels():
            label.set_horizontalalignment("right")


def _layer_label(layers: Sequence[str], value: float) -> str:
    place = round(value)
    return words.shorten(layers[place], 18) if 0 <= place < len(layers) and abs(value - place) < 1e-6 else ""


def log_axis(ax: Axes, values: Iterable[float] = ()) -> None:
    """A logarithmic y axis when a value is above 0, with at most seven labels however many decades there are."""
    finite = [v for v in values if math.isfinite(v) and v > 0]
    if not finite:
        return
    ax.set_yscale("log")
    low, high = math.log10(min(finite)), math.log10(max(finite))
    if high - low < 1:
        low, high = (low + high) / 2 - 0.6, (low + high) / 2 + 0.6
    margin = 0.06 * (high - low)
    ax.set_ylim(10 ** max(low - margin, -300), 10 ** min(high + margin, 300))
    ax.yaxis.set_major_locator(LogLocator(numticks=7))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.power(round(math.log10(value)))))


def sequential(theme: Theme) -> Colormap:
    """Viridis without its darkest tenth, so that an exact zero (black) stands apart."""
    import matplotlib

    base = matplotlib.colormaps["viridis"]
    cmap = ListedColormap([base(0.1 + 0.9 * i / 255) for i in range(256)], name="gradwatch")
    return cmap.with_extremes(bad=theme.absent)


def flat(colour: str) -> Colormap:
    """One colour for every value."""
    return ListedColormap([colour], name="flat")


def thin(n: int, room: int, must: Sequence[int] = ()) -> list[int]:
    """Which of `n` rows to label when only `room` labels fit: those of `must` first, the rest evenly between.

    Examples:
        >>> thin(5, 10), thin(600, 4, must=[7])
        ([0, 1, 2, 3, 4], [7, 157, 307, 457])
    """
    if n <= room:
        return list(range(n))
    apart = math.ceil(n / max(room, 1))
    chosen: list[int] = []
    for row in [*must, *range(n)]:
        if 0 <= row < n and all(abs(row - other) >= apart for other in chosen):
            chosen.append(row)
    return sorted(chosen)


def row_labels(ax: Axes, names: Sequence[str], *, theme: Theme, must: Sequence[int] = (), width: int = 28) -> None:
    """Names at the rows 0, 1, ... of the y axis, thinned out until they cannot overlap; those of `must` are bold."""
    figure = ax.figure
    height = ax.get_position().height * figure.bbox.height / _dpi(figure) * 72
    rows = thin(len(names), max(1, int(height / (1.25 * LABEL_POINTS))), must)
    ax.set_yticks(rows, [words.shorten(names[row], width) for row in rows])
    important = set(must)
    for row, label in zip(rows, ax.get_yticklabels(), strict=True):
        label.set_parse_math(False)
        if row in important:
            label.set_fontweight("bold")
            label.set_color(theme.severity["critical"])


def legend(ax: Axes, theme: Theme, entries: Sequence[tuple[Artist, str]], **options: Any) -> None:
    """A legend without frame whose labels are shown as they are, also with a leading underscore or a dollar sign."""
    if not entries:
        return
    handles, labels = zip(*entries, strict=True)
    shown = ax.legend(handles, [f" {text}" for text in labels], frameon=False, fontsize=LABEL_POINTS, **options)
    for text in shown.get_texts():
        text.set_color(theme.ink)
        text.set_parse_math(False)


def note(ax: Axes, text: str, theme: Theme) -> None:
    """Words in place of a picture, where there is nothing to draw."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=theme.ink, fontsize=10,
            parse_math=False, wrap=True)  # fmt: skip
    ax.set_xticks([])
    ax.set_yticks([])


def _dpi(figure: Figure | SubFigure) -> float:
    return float(figure.dpi)
