"""A labelled training, published or our own, and how one of its runs ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Training:
    """One run, ready to start.

    Args:
        model: Made of ordinary modules.
        optimizer: What updates it; several where the training has several (a GAN).
        step: Does all of step k, the optimizer's update included; returns the loss that a user would log.
        steps: How many updates the run has.
        metric: What the trained model is judged by, higher is better; None where there is no such number.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer]
    step: Callable[[int], Tensor]
    steps: int
    metric: Callable[[], float] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        failed: Whether the fault came true.
        failure_step: The step at which the loss blew up or was no number; None for a run that got stuck or is well.
        steps: Number of steps that were trained.
        first_loss: The loss of step 0.
        final_loss: A robust mean of the last losses; NaN when one of them is not finite.
    """

    failed: bool
    failure_step: int | None
    steps: int
    first_loss: float
    final_loss: float

    @property
    def stuck(self) -> bool:
        """Failed without ever blowing up."""
        return self.failed and self.failure_step is None


@dataclass(frozen=True)
class Case:
    """A training with a label.

    Args:
        id: Unique over all suites.
        suite: `cases` (published) or `scenarios` (our own).
        tier: `core` runs are scored by their label, `stochastic` ones by their outcome.
        classes: The class of the fault, then the other names that count as right; `("healthy",)` without a fault.
        build: Seed to a training.
        judge: The losses of a run and its seed to its outcome.
        fingerprint: Everything that the recorded numbers depend on besides the seed.
        rules: The rules of which at least one should fire; empty where only the class is known.
        causes: The causes (ids of `gradwatch.diagnosis`) of which one should be named; empty where none is known.
        sudden: Nothing in the steps before the failure foretells it (a single bad batch).
        cost: Seconds that one run takes, roughly; cheap ones are recorded first.
        spec: The specification of a published case, from which other frameworks can build it too.
        beyond: Why nothing that changes rates, weights or steps can repair it; empty where something might.
        twin: The same training without its fault, from a seed; None where none is needed to tell a repair.
    """

    id: str
    suite: str
    tier: str
    classes: tuple[str, ...]
    build: Callable[[int], Training]
    judge: Callable[[Losses, int], Outcome]
    fingerprint: str
    rules: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    sudden: bool = False
    cost: float = 10.0
    spec: Mapping[str, Any] | None = None
    beyond: str = ""
    twin: Callable[[int], Training] | None = None

    @property
    def faulty(self) -> bool:
        """Whether the label names a fault."""
        return self.classes[0] != "healthy"
