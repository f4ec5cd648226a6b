"""How a scenario is written: a function from nothing to a `Training`, with its label in the decorator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.casework import fingerprint
from benchmarks.casework.case import Case, Losses, Outcome, Training
from benchmarks.casework.outcome import BLOW_UP, STUCK

#: How a fault shows in the run, which is checked: the loss blows up, in a way that the steps before foretell or not;
#: nothing is learnt; or the loss looks well although a part of the network is sick, by construction.
Ends = Literal["blow_up", "sudden", "stuck", "silent"]
Batches = Iterator[tuple[Tensor, ...]]
Scenario = Callable[..., Training]
LossFunction = Callable[[Any, Tensor], Tensor]

SCENARIOS: dict[str, Case] = {}
UNIFORM_10 = math.log(10)


def healthy(*, learns: float = 0.7, name: str = "", **arguments: Any) -> Callable[[Scenario], Scenario]:
    """Register a healthy scenario.

    Args:
        learns: The final loss must be below this share of the first, else the run is no evidence.
        name: Id, by default the function's name.
        arguments: Passed to the function.
    """
    judge = functools.partial(_judge_healthy, learns=learns)
    return lambda function: _register(function, arguments, classes=("healthy",), judge=judge, name=name)


def faulty(
    *classes: str,
    ends: Ends,
    rules: tuple[str, ...],
    causes: tuple[str, ...],
    constant: float | None = None,
    beyond: str = "",
    twin: Callable[[], Training] | None = None,
    name: str = "",
    **arguments: Any,
) -> Callable[[Scenario], Scenario]:
    """Register a faulty scenario.

    Args:
        classes: The class of the fault, then further names that count as right.
        ends: How it shows.
        rules: Of these at least one should fire.
        causes: Of these one should be named.
        constant: Loss of the best constant predictor, for `ends="stuck"`; without it the first loss.
        beyond: Why nothing that changes rates, weights or steps can repair it: what would have to change (the
            `architecture`, the `precision`, the `program`), a colon, and why.
        twin: The same training without the fault, where its own loss is noisy or its steps are few.
        name: Id, by default the function's name.
        arguments: Passed to the function, so that one function may serve several scenarios.
    """
    judge = functools.partial(_judge_faulty, ends=ends, constant=constant)

    label: dict[str, Any] = {
        "classes": classes, "judge": judge, "rules": rules, "causes": causes, "beyond": beyond,
        "twin": None if twin is None else functools.partial(_seeded, twin),
    }  # fmt: skip
    return lambda function: _register(function, arguments, name=name, sudden=ends == "sudden", **label)


def _register(
    function: Scenario,
    arguments: dict[str, Any],
    *,
    name: str = "",
    **label: Any,
) -> Scenario:
    identity = name or function.__name__.replace("_", "-")
    if identity in SCENARIOS:
        raise ValueError(f"two scenarios are named {identity!r}")

    SCENARIOS[identity] = Case(
        id=identity,
        suite="scenarios",
        tier="core",
        build=functools.partial(_seeded, functools.partial(function, **arguments)),
        fingerprint=fingerprint.of_function(function, arguments),
        cost=2.0,
        **label,
    )
    return function


def _seeded(make: Callable[[], Training], seed: int) -> Training:
    torch.manual_seed(seed)
    return make()


def _judge_healthy(losses: Losses, seed: int, *, learns: float) -> Outcome:
    first, final = float(np.mean(losses[:3])), float(np.mean(losses[-max(5, len(losses) // 10) :]))
    return Outcome(not final < learns * abs(first), None, len(losses), first, final)


def _judge_faulty(losses: Losses, seed: int, *, ends: Ends, constant: float | None) -> Outcome:
    first, final = float(losses[0]), float(np.median(losses[-max(5, len(losses) // 20) :]))
    step = blow_up_from_best(losses) if ends in ("blow_up", "sudden") else None
    stuck = not final < STUCK * (first if constant is None else min(first, constant))
    failed = {"blow_up": step is not None, "sudden": step is not None, "stuck": stuck, "silent": True}[ends]
    return Outcome(failed, step, len(losses), first, final)


def blow_up_from_best(losses: Losses) -> int | None:
    """The first step whose loss is not finite, or is above ten times the best (the median of it and the next four too).

    The best is over medians of five steps, so that neither a lucky batch nor a single bad one counts; nor does a loss
    below a tenth of the first.
    """
    filled = np.where(np.isfinite(losses), losses, np.inf)
    best = np.inf
    for k, loss in enumerate(filled):
        limit = max(BLOW_UP * best, 0.1 * filled[0])
        if loss == np.inf or (loss > limit and np.median(filled[k : k + 5]) > limit):
            return k
        best = min(best, float(np.median(filled[max(0, k - 4) : k + 1])))
    return None


def supervised(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    loss: LossFunction = F.cross_entropy,
    *,
    steps: int,
    rate: Callable[[int], float] | None = None,
    before_step: Callable[[int], None] | None = None,
    accumulate: Callable[[int], int] = lambda k: 1,
    clear: bool = True,
) -> Training:
    """The ordinary loop: forward, loss, backward, step.

    Args:
        model: Called on the first tensor of a batch.
        optimizer: Updates it.
        batches: Tensors (inputs, targets), without end.
        loss: Of output and targets.
        steps: Number of updates.
        rate: Step to learning rate; None leaves it.
        before_step: Called after backward, before the update.
        accumulate: Step to number of batches whose mean gradient makes the update.
        clear: Whether the loop remembers to zero the gradients.
    """

    def step(k: int) -> Tensor:
        if clear:
            optimizer.zero_grad()
        parts = accumulate(k)
        total = torch.zeros(())
        for _ in range(parts):
            inputs, targets = next(batches)
            value = loss(model(inputs), targets)
            (value / parts).backward()
            total += value.detach().float() / parts
        if before_step is not None:
            before_step(k)
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(k)
        optimizer.step()
        return total

    return Training(model, optimizer, step, steps)
