"""Before and after an action: did the gradients get better?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradwatch.records import ActionRecord
from gradwatch.reporters import style, words
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.figures.timeline import draw_band, middles

#: Steps shown, and gathered into one profile, on each side of an action.
AROUND = 60
PROFILE = 20


def before_after(digest: Digest, action: ActionRecord, *, theme: str = "light", fig: Any = None) -> Figure:
    """Draw the global norm around an action, and the layers' norms before and after it.

    Args:
        digest: The steps around the action, best one bin per step.
        action: What was done.
        theme: `light` or `dark`.
        fig: Figure or SubFigure to draw on; a new one by default.

    Returns:
        The figure.
    """
    look = style.theme_of(theme)
    figure = style.canvas((10.0, 4.0), theme=look, fig=fig)
    left, right = figure.subplots(1, 2)
    style.dress(left, look, xlabel="step", ylabel="global gradient norm")
    style.dress(right, look, xlabel="layer, input → output", ylabel="gradient norm (L2), median")
    outcome = f": {words.visible(action.outcome)}" if action.outcome else ""
    figure.suptitle(
        f"{words.visible(action.action)} at step {words.step(action.step)}{outcome}",
        color=look.ink, fontsize=11, fontweight="bold", x=0.02, ha="left", parse_math=False,
    )  # fmt: skip
    band = digest.metric("global_norm") if len(digest) else None
    if band is not None:
        draw_band(left, middles(digest), band, look.lines[1])
        style.log_axis(left, np.concatenate([band.low, band.high]))
        left.axvline(action.step, color=look.action, lw=1.4, ls="--")
        style.step_axis(left, most=5)
    entries: list[tuple[Any, str]] = []
    shown = []
    for label, rows, colour in _sides(digest, action.step, look):
        with np.errstate(all="ignore"):
            profile = np.array(
                [np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in digest.norms.mid[rows].T]
            )
        (line,) = right.plot(profile, color=colour, lw=1.8, marker="o" if len(profile) <= 40 else None, ms=3.5)
        entries.append((line, label))
        shown.append(profile)
    style.log_axis(right, np.concatenate(shown) if shown else ())
    style.layer_axis(right, digest.layers, most=7)
    style.legend(right, look, entries, loc="best")
    return figure  # type: ignore[no-any-return]


def _sides(digest: Digest, step: int, theme: style.Theme) -> list[tuple[str, Any, str]]:
    before = np.flatnonzero(digest.last < step)[-PROFILE:]
    after = np.flatnonzero(digest.first >= step)[:PROFILE]
    sides = (
        (f"{len(before)} steps before", before, theme.lines[1]),
        (f"{len(after)} steps after", after, theme.lines[0]),
    )
    return [side for side in sides if len(side[1])]
