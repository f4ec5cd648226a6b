"""The charts of the comparison page, as plotly takes them: plain JSON, drawn by `compare.js`."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from gradwatch.reporters import style, words
from gradwatch.reporters.binning import Array
from gradwatch.reporters.comparison import Alignment
from gradwatch.reporters.figures.comparison import colour_limit, layer_ratio
from gradwatch.reporters.figures.timeline import middles

#: Runs whose layers are held against the first one's in a heatmap each.
MOST_HEATMAPS = 3
#: How many cells each of them has at most.
CELLS = 60_000
#: Pixels of a line chart, of a row of a heatmap, and between charts.
_LINES, _ROW, _GAP = 190, 15, 58
_METRICS = (("loss", "loss"), ("global_norm", "global gradient norm"))
#: Violet below, orange above, white where equal: PuOr of ColorBrewer, safe for the colour-blind.
_COLOURS = [[0.0, "#542788"], [0.25, "#b2abd2"], [0.5, "#f7f7f7"], [0.75, "#fdb863"], [1.0, "#b35806"]]
#: The same on a dark page: the middle as dark as that, the ends bright.
_DARK_COLOURS = [[0.0, "#c4b5f5"], [0.25, "#6b55a8"], [0.5, "#1b2130"], [0.75, "#a8620f"], [1.0, "#ffb35c"]]


def charts(compared: Alignment) -> dict[str, Any]:
    """Traces and layout: a panel of lines per metric, and a heatmap of layer ratios per further run."""
    drawn = _Drawn(compared)
    for metric, label in _METRICS:
        drawn.lines(metric, label)
    for other in range(1, min(len(compared.runs), 1 + MOST_HEATMAPS)):
        drawn.ratios(other)
    return {"traces": drawn.traces, "layout": drawn.layout()}


class _Drawn:
    """Panels from top to bottom.

    Args:
        compared: The runs.
    """

    def __init__(self, compared: Alignment) -> None:
        self.compared = compared
        self.traces: list[dict[str, Any]] = []
        self._axes: dict[str, Any] = {}
        self._heights: list[int] = []

    def lines(self, metric: str, label: str) -> None:
        """One line per run."""
        axis = self._panel(_LINES, label)
        low, high = np.inf, -np.inf
        colours = style.theme_of("light").lines
        for i, (name, digest) in enumerate(zip(self.compared.names, self.compared.digests, strict=True)):
            band = digest.metric(metric) if len(digest) else None
            if band is None:
                continue
            x = middles(digest) if self.compared.by == "step" else self.compared.seconds(i)
            colour = colours[i % len(colours)]
            shown = _inert(words.visible(name))
            self.traces.append({
                "type": "scatter", "mode": "lines", "x": _plain(x), "y": _plain(band.mid), "name": shown,
                "legendgroup": shown, "showlegend": metric == _METRICS[0][0], "line": {"color": colour, "width": 1.6},
                "hovertemplate": f"<b>{shown}</b><br>{self.compared.by} %{{x}}<br>{label} %{{y:.4g}}<extra></extra>",
                **axis,
            })  # fmt: skip
            finite = band.mid[np.isfinite(band.mid)]
            low, high = min(low, finite.min(initial=np.inf)), max(high, finite.max(initial=-np.inf))
        if low > 0 and high > 20 * low:
            self._axes[self._names()[1]] |= {"type": "log", "exponentformat": "power"}

    def ratios(self, other: int) -> None:
        """Layer by step: the norms of a run over those of the first."""
        first, second = self.compared.digests[0], self.compared.digests[other]
        common = [name for name in first.layers if name in set(second.layers)]
        if not common or not len(first) or not len(second):
            return
        names = [_inert(words.shorten(self.compared.names[i], 24)) for i in (0, other)]
        axis = self._panel(max(160, min(480, _ROW * len(common) + 40)), f"{names[1]} ÷ {names[0]}", is_steps=True)
        ratio = layer_ratio(first, second, common)
        edges, ratio = _coarser(first.edges, ratio)
        shown = [_inert(words.visible(name)) for name in common]
        limit = colour_limit(ratio)
        self._axes[self._names()[1]] |= {
            "autorange": "reversed", "showgrid": False, "tickmode": "array", **_ticks(shown, self._heights[-1]),
        }  # fmt: skip
        self.traces.append({
            "type": "heatmap", "x": _plain(edges), "z": [_plain(row.round(2)) for row in ratio.T], "layers": shown,
            "zmin": -limit, "zmax": limit, "colorscale": _COLOURS, "darkscale": _DARK_COLOURS, "showscale": False,
            "hoverongaps": False,
            "hovertemplate": "step %{x}<br>%{text}<extra></extra>", **axis,
        })  # fmt: skip

    def _panel(self, height: int, title: str, *, is_steps: bool = False) -> dict[str, str]:
        self._heights.append(height)
        x, y = self._names()
        apart = is_steps and self.compared.by != "step"
        unit = "step" if is_steps or self.compared.by == "step" else "seconds since the start"
        linked = {} if len(self._heights) == 1 or apart else {"matches": "x"}
        self._axes[x] = {"title": {"text": unit, "standoff": 4}, "anchor": y.replace("axis", ""), **linked}
        self._axes[y] = {"title": {"text": title, "standoff": 8}, "automargin": True, "anchor": x.replace("axis", "")}
        return {"xaxis": x.replace("axis", ""), "yaxis": y.replace("axis", "")}

    def _names(self) -> tuple[str, str]:
        number = "" if len(self._heights) == 1 else str(len(self._heights))
        return f"xaxis{number}", f"yaxis{number}"

    def layout(self) -> dict[str, Any]:
        """Every panel's place; the colours of text and grid are set by the page."""
        inner = sum(self._heights) + _GAP * (len(self._heights) - 1)
        bottom = inner
        for i, height in enumerate(self._heights):
            axis = self._axes[f"yaxis{i + 1 if i else ''}"]
            axis["domain"] = [max(0.0, (bottom - height) / inner), bottom / inner]
            bottom -= height + _GAP
        return {"height": inner + 110, "margin": {"l": 110, "r": 12, "t": 46, "b": 50}, **self._axes}


def _coarser(edges: Array, ratio: Array) -> tuple[Array, Array]:
    """At most `CELLS` cells: neighbouring bins as one, with the value furthest from one."""
    width = max(1, -(-ratio.size // CELLS))
    starts = np.arange(0, len(ratio), width)
    far = np.where(np.isfinite(ratio), np.abs(ratio), -1.0)
    rows = np.array([start + far[start : start + width].argmax(axis=0) for start in starts])
    return np.append(edges[starts], edges[-1]), np.take_along_axis(ratio, rows, axis=0)


def _inert(text: str) -> str:
    """Plotly reads a small HTML in its texts: names from a run must stay letters."""
    return escape(text, quote=False)


def _ticks(names: list[str], height: int) -> dict[str, Any]:
    every = max(1, -(-len(names) * 13 // height))
    return {"tickvals": list(range(0, len(names), every)), "ticktext": [words.shorten(n, 18) for n in names[::every]]}


def _plain(values: Array) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
