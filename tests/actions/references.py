"""The published formulae of adaptive clipping, written down independently, step by step, as the papers' loops run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt


def zclip_limits(norms: Sequence[float], *, alpha: float, threshold: float, warmup: int) -> Iterator[float]:
    """The norm that each gradient has after ZClip (arXiv 2504.02507, algorithm 1, reciprocal clipping)."""
    first = list(norms[:warmup])
    yield from first
    mean, variance = statistics.fmean(first), statistics.pvariance(first)
    for norm in norms[warmup:]:
        score = (norm - mean) / (variance**0.5 + 1e-6)
        kept = mean + threshold / score * threshold * variance**0.5 if score > threshold else norm
        mean = alpha * mean + (1 - alpha) * kept
        variance = alpha * variance + (1 - alpha) * (kept - mean) ** 2
        yield kept


def autoclip_limits(norms: Sequence[float], *, percentile: float) -> Iterator[float]:
    """The clipping threshold of each step of AutoClip (Seetharaman et al. 2020, algorithm 1)."""
    for i in range(len(norms)):
        yield float(np.percentile(norms[: i + 1], percentile))


def agc_gradient(
    gradient: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], *, clip_factor: float, eps: float
) -> npt.NDArray[np.float64]:
    """Equation 3 of Brock et al. 2021, row by row."""
    rows = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient[None]
    weights = weight.reshape(len(weight), -1) if weight.ndim > 1 else weight[None]
    clipped = rows.copy()
    for i, (row, w) in enumerate(zip(rows, weights, strict=True)):
        largest = clip_factor * max(float(np.linalg.norm(w)), eps)
        if np.linalg.norm(row) > largest:
            clipped[i] = row * largest / np.linalg.norm(row)
    return clipped.reshape(gradient.shape)
