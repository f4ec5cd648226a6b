"""A small picture of the global norm, for channels that can carry one."""

from __future__ import annotations

import io
from collections import deque

import numpy as np

from gradwatch.records import StepBatch

#: Points that the picture remembers; past that, every second one is let go and the spacing doubles.
MOST_POINTS = 512
_WIDTH, _HEIGHT, _EDGE = 480, 140, 8
_INK, _PAPER, _ALARM, _GREY = (31, 90, 166), (255, 255, 255), (200, 40, 40), (120, 120, 120)


class NormPlot:
    """Remembers the global norm of the whole run in at most `MOST_POINTS` points."""

    def __init__(self) -> None:
        self._points: deque[tuple[int, float]] = deque()
        self._every = self._wait = 1

    def add(self, batch: StepBatch) -> None:
        """Take the last step of a batch, or none; called by the training thread."""
        self._wait -= 1
        if self._wait > 0:
            return
        norm = batch.metrics.get("global_norm")
        if norm is None:
            return
        self._points.append((int(batch.step[-1]), float(norm[-1])))
        if len(self._points) >= MOST_POINTS:
            self._points = deque(list(self._points)[::2])
            self._every *= 2
        self._wait = self._every

    def png(self) -> bytes | None:
        """The picture; None while there are less than two points, or without Pillow."""
        points = list(self._points)
        if len(points) < 2:
            return None
        try:
            from PIL import Image, ImageDraw
        except ImportError:
            return None
        step, norm = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log10(norm)
        good = np.isfinite(logs)
        if not good.any():
            return None
        low, high = float(logs[good].min()), float(logs[good].max())
        x = _EDGE + (step - step[0]) / max(step[-1] - step[0], 1) * (_WIDTH - 2 * _EDGE)
        y = _EDGE + 14 + (high - np.where(good, logs, high)) / max(high - low, 1e-9) * (_HEIGHT - 2 * _EDGE - 14)
        image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
        draw = ImageDraw.Draw(image)
        words = f"global gradient norm, steps {int(step[0])}-{int(step[-1])}, {10**low:.3g} to {10**high:.3g} (log)"
        draw.text((_EDGE, 4), words, fill=_GREY)
        kept = list(zip(x[good].tolist(), y[good].tolist(), strict=True))
        draw.line(kept if len(kept) > 1 else kept * 2, fill=_INK, width=2)
        for place in x[~good].tolist():  # NaN, inf or zero: no place on a logarithmic axis
            draw.line([(place, _EDGE + 14), (place, _HEIGHT - _EDGE)], fill=_ALARM)
        file = io.BytesIO()
        image.save(file, "PNG", optimize=False)
        return file.getvalue()
