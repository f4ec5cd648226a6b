"""When did a run fail? From its losses alone, so that no detector has a say in the truth."""

from __future__ import annotations

import numpy as np

from benchmarks.casework.case import Losses, Outcome

#: A loss above this many times the first one is a blow-up.
BLOW_UP = 10.0
#: A final loss above this share of the best constant predictor's means that nothing was learnt.
STUCK = 0.9
#: The same for losses without a best constant predictor, as a share of the first loss.
STUCK_OF_FIRST = 0.7
#: fastai's LRFinder stops when the smoothed loss exceeds this many times its best.
RANGE_TEST = 4.0


def judge(
    losses: Losses,
    *,
    constant: float | None = None,
    tiny_batch: bool = False,
    range_test: bool = False,
) -> Outcome:
    """The outcome of a run by the published cases' definition.

    A run failed when a loss is not finite, or is above ten times the first (LR range tests: fastai's rule), or when the
    final loss is above 0.9 times that of the best constant predictor.

    Args:
        losses: Shape (n,), n >= 1.
        constant: Loss of the best constant predictor; None where it is not defined.
        tiny_batch: With few samples a batch the first loss is luck: take the worst of 20, and a mean at the end.
        range_test: The learning rate was raised until it had to break.
    """
    first = float(losses[0])
    final = _final(losses, tiny_batch)
    step = range_test_failure(losses) if range_test else blow_up(losses, tiny_batch)
    finite = bool(np.isfinite(losses).all())
    stuck = final > (STUCK_OF_FIRST * first if constant is None else STUCK * constant)
    return Outcome(
        failed=step is not None or not finite or bool(stuck),
        failure_step=step,
        steps=len(losses),
        first_loss=first,
        final_loss=final,
    )


def blow_up(losses: Losses, tiny_batch: bool = False) -> int | None:
    """The first step whose loss is not finite, or above ten times the first loss."""
    start = losses[:20] if tiny_batch else losses[:1]
    base = float(np.nanmax(start)) if np.isfinite(losses[0]) or tiny_batch else np.nan
    bad = ~np.isfinite(losses) | ((losses > BLOW_UP * base) & (losses > base + 1))
    return _first(bad)


def range_test_failure(losses: Losses) -> int | None:
    """The step at which fastai's LRFinder would have stopped: smoothed loss above four times its best."""
    smooth, best = 0.0, np.inf
    for k, loss in enumerate(losses):
        if not np.isfinite(loss):
            return k
        smooth = 0.98 * smooth + 0.02 * loss
        unbiased = smooth / (1 - 0.98 ** (k + 1))
        best = min(best, unbiased)
        if (unbiased > RANGE_TEST * best and k > 1) or (k > 20 and loss > RANGE_TEST * best):
            return k
    return None


def loss_disaster(losses: Losses) -> int | None:
    """The first step whose loss is not finite, or above ten times the best so far and above the first."""
    best = np.minimum.accumulate(np.where(np.isfinite(losses), losses, np.inf))
    return _first(~np.isfinite(losses) | ((losses > BLOW_UP * best) & (losses > losses[0])))


def _final(losses: Losses, tiny_batch: bool) -> float:
    count = max(5, len(losses) // 20)
    last = losses[-count:]
    if not np.isfinite(last).all():
        return float("nan")
    return float(np.mean(losses[-max(count, 50) :])) if tiny_batch else float(np.median(last))


def _first(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> int | None:
    return int(np.argmax(mask)) if mask.any() else None
