"""Runs a training, watched or not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.casework.case import Case, Losses, Outcome, Training

#: A run ends after this much processor time, however far it is.
SECONDS = 60.0
#: A run ends when this many losses in a row are not finite.
NONFINITE_LOSSES = 6


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        losses: One a step, up to where it ended.
        training: The training with the trained model.
        outcome: The verdict on the losses.
        metric: What the trained model is judged by; NaN where there is no such number.
        stopped: Whether the action `Stop` ended it.
    """

    losses: Losses
    training: Training
    outcome: Outcome
    metric: float
    stopped: bool = False


def train(
    case: Case,
    seed: int,
    *,
    run_dir: str | Path | None = None,
    watch_kwargs: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
) -> Trained:
    """Train `case` as a user of gradwatch would.

    Args:
        case: What to train.
        seed: Seeds weights, data and order.
        run_dir: Where the watcher writes; None trains without a watcher.
        watch_kwargs: Further arguments of `gradwatch.watch`, such as `actions`.
        seconds: Processor time after which the run is cut short.
    """
    torch.set_num_threads(1)
    training = case.build(seed)
    losses: list[float] = []
    stopped = False
    if run_dir is None:
        run(training, losses.append, seconds=seconds)
    else:
        stopped = _run_watched(training, losses, run_dir, dict(watch_kwargs or {}), seconds)
    metric = training.metric() if training.metric else math.nan
    seen = np.array(losses or [math.nan])
    return Trained(seen, training, case.judge(seen, seed), metric, stopped)


def _run_watched(
    training: Training, losses: list[float], run_dir: str | Path, settings: dict[str, Any], seconds: float
) -> bool:
    """Run under a watcher, adding to `losses`; whether `Stop` ended it."""
    import gradwatch as gw

    with gw.watch(training.model, training.optimizer, run_dir=run_dir, **settings) as watcher:

        def log(loss: float) -> None:
            losses.append(loss)
            watcher.log(loss=loss)

        try:
            run(training, log, seconds=seconds)
        except gw.StopTraining:
            return True
    return False


def run(training: Training, log: Callable[[float], None], *, seconds: float = SECONDS) -> Losses:
    """Take the steps of `training`, pass each loss to `log`, and return the losses."""
    losses: list[float] = []
    started = time.process_time()
    for k in range(training.steps):
        loss = float(training.step(k))
        losses.append(loss)
        log(loss)
        if len(losses) > NONFINITE_LOSSES and not any(map(math.isfinite, losses[-NONFINITE_LOSSES:])):
            break
        if time.process_time() - started > seconds:
            break
    return np.array(losses)
