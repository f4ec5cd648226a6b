"""A picture of layers by steps, small enough to be sent to another tool."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

#: Columns that are kept; past that, every second one is let go and the spacing doubles.
MOST_COLUMNS = 512
#: Five points of the viridis colour map (Smith and van der Walt, 2015), dark to light.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)
_NONFINITE, _ABSENT = (214, 39, 40), (238, 238, 238)
#: Pixels per layer and per step, at least.
_CELL, _LEAST_WIDTH = 6, 256


class Heatmap:
    """Gathers norms and draws their logarithms, the input above; red is NaN or infinite, grey is no gradient."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._columns: list[dict[str, float]] = []
        self._every = self._wait = 1

    def add(self, norms: Mapping[str, float]) -> None:
        """Take the norms of one step; an empty mapping is passed over."""
        if not norms:
            return
        self._wait -= 1
        if self._wait:
            return
        known = set(self._names)
        self._names += [name for name in norms if name not in known]
        self._columns.append(dict(norms))
        if len(self._columns) >= MOST_COLUMNS:
            self._columns = self._columns[::2]
            self._every *= 2
        self._wait = self._every

    def png(self) -> tuple[bytes, int, int] | None:
        """The picture with its width and height in pixels; None while there is nothing to show, or without Pillow."""
        if not self._columns:
            return None
        try:
            from PIL import Image
        except ImportError:
            return None
        colours = self._colours()
        scale = max(1, -(-_LEAST_WIDTH // colours.shape[1]))
        pixels = np.repeat(np.repeat(colours, _CELL, axis=0), scale, axis=1)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue(), pixels.shape[1], pixels.shape[0]

    def _colours(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        norms = np.array([[column.get(name, 0.0) for column in self._columns] for name in self._names])
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log10(norms)
        good = np.isfinite(logs)
        low, high = (float(logs[good].min()), float(logs[good].max())) if good.any() else (0.0, 1.0)
        place = np.where(good, (logs - low) / max(high - low, 1e-9), 0.0) * (len(_COLOURS) - 1)
        colours = np.stack([np.interp(place, range(len(_COLOURS)), _COLOURS[:, c]) for c in range(3)], axis=-1)
        colours[~np.isfinite(norms)] = _NONFINITE
        colours[norms == 0] = _ABSENT
        return colours.astype(np.uint8)
