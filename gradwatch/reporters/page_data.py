"""What the page's script draws from: plain JSON, arrays of numbers as base64 of little-endian float32."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from gradwatch.records import NOT_MEASURED
from gradwatch.reporters import words
from gradwatch.reporters.binning import Array, Band
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.figures.depth import chosen_bins, slope
from gradwatch.reporters.figures.heatmap import colour_scale, spans
from gradwatch.reporters.figures.timeline import reads_logarithmic
from gradwatch.reporters.story import Chapter
from gradwatch.reporters.summary import Summary

#: How many cells of a heatmap a page carries at most.
CELLS = 70_000
MOST_FINDINGS = 60
MOST_ACTION_MARKS = 60

#: Panels above the heatmap: metric, legend, colour, dash.
_PANELS: tuple[tuple[str, tuple[tuple[str, str, int, str], ...]], ...] = (
    ("loss", (("loss", "loss", 0, "solid"),)),
    (
        "global norm",
        (("global_norm", "global norm", 1, "solid"), ("post_clip_norm", "global norm after clipping", 3, "dash")),
    ),
    ("lr", (("lr", "learning rate", 2, "solid"), ("own_lr", "learning rate with gradwatch's factor", 4, "dash"))),
)


def page_data(summary: Summary, whole: Digest, closeup: Digest | None) -> dict[str, Any]:
    """Everything the page's charts need.

    Args:
        summary: The summary of the run.
        whole: The whole run.
        closeup: Every step around the onset; None when `whole` shows every step.
    """
    place = {name: row for row, name in enumerate(whole.layers)}
    scale = colour_scale(whole.norms.striking())
    rows = chosen_bins(whole, root=summary.root)
    return {
        "layers": [words.visible(name) for name in whole.layers],
        "stage": " and ".join(stage.replace("_", "-") for stage in whole.stages),
        "scale": [float(np.log10(limit)) for limit in (scale.vmin, scale.vmax) if limit],
        "whole": _view(whole),
        "closeup": _view(closeup) if closeup is not None and len(closeup) else None,
        "panels": [_panel(whole, label, series) for label, series in _PANELS],
        "findings": [_box(c, place) for c in _gravest(summary)],
        "actionSteps": sorted({a.step for a in summary.actions if not a.dry_run})[:MOST_ACTION_MARKS],
        "onset": _onset(summary),
        "worst": [place[name] for name in (summary.root.layers if summary.root else ()) if name in place][:12],
        "profile": [_profile(whole, row, summary.root) for row in rows],
        "fit": _fit(whole, rows),
    }  # fmt: skip


def _panel(digest: Digest, label: str, series: tuple[tuple[str, str, int, str], ...]) -> dict[str, Any]:
    name = series[0][0]
    band = digest.metric(name)
    return {"label": label, "series": series, "log": band is not None and reads_logarithmic(name, band)}


def _fit(digest: Digest, rows: list[int]) -> dict[str, str] | None:
    fit = slope(digest.norms.mid[rows[-1]]) if rows else None
    if fit is None:
        return None
    label = f"fit, last step: ×{words.number(1 / fit[0])} per layer towards the input"
    return {"label": label, "line": packed(fit[1])}


def packed(values: Array) -> str:
    """Numbers as base64 of little-endian float32; beyond its range they become its largest number."""
    limit = float(np.finfo(np.float32).max)
    clipped = np.where(np.isfinite(values), np.clip(values, -limit, limit), values)
    return base64.b64encode(clipped.astype("<f4").tobytes()).decode()


def _view(digest: Digest) -> dict[str, Any]:
    cells = digest.norms.striking()
    cells = np.where(digest.nonfinite, np.nan, np.where(np.isnan(cells), NOT_MEASURED, cells))
    bands = {name: digest.metric(name) for name in ("loss", "global_norm", "post_clip_norm", "lr", "own_lr")}
    return {
        "first": digest.first.tolist(),
        "last": digest.last.tolist(),
        "edges": digest.edges.tolist(),
        "norms": packed(cells.T),
        "metrics": {name: _band(band) for name, band in bands.items() if band is not None},
    }


def _band(band: Band) -> dict[str, str]:
    return {"low": packed(band.low), "mid": packed(band.mid), "high": packed(band.high)}


def _gravest(summary: Summary) -> list[Chapter]:
    shown = [c for c in summary.chapters if c.severity != "info"]
    return sorted(shown, key=lambda c: (c.severity == "critical", -c.first_step))[-MOST_FINDINGS:]


def _box(chapter: Chapter, place: dict[str, int]) -> dict[str, Any]:
    return {
        "rule": words.visible(chapter.rule),
        "severity": chapter.severity,
        "first": chapter.first_step,
        "last": None if chapter.is_open else chapter.last_step,
        "rows": spans([place[name] for name in chapter.layers if name in place])[:20],
    }


def _onset(summary: Summary) -> dict[str, Any] | None:
    root = summary.root
    if root is None or summary.trouble is None:
        return None
    lasts = summary.trouble.is_open or root.last_step > root.first_step
    at = f"step {words.step(root.first_step)}"
    return {
        "step": root.first_step, "severity": root.severity, "text": f"{root.phrase}: {at}", "short": at,
        "lasts": lasts,
    }  # fmt: skip


def _profile(digest: Digest, row: int, root: Chapter | None) -> dict[str, Any]:
    first, last = int(digest.first[row]), int(digest.last[row])
    onset = root is not None and first <= root.first_step <= last
    label = f"step {words.step(first)}" if first == last else f"steps {words.step(first)}–{words.step(last)}"
    return {
        "label": label + (" (onset)" if onset else ""),
        "onset": onset,
        "norms": packed(digest.norms.striking()[row]),
    }
