"""gradwatch's factor on the learning rate beside every scheduler of torch: none of them sees it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from gradwatch.actions import DecayLR
from tests.torch.loops import data, mlp, mse, watching

SCHEDULERS: dict[str, Any] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "SWALR": lambda o: SWALR(o, 0.5, anneal_epochs=4),
}


def test_the_list_is_complete() -> None:
    of_torch = {
        name
        for name, member in vars(lr_scheduler).items()
        if inspect.isclass(member) and issubclass(member, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert of_torch - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scaled_rate_trains_as_if_scaled_by_hand_and_the_scheduler_goes_its_way(run_dir: Path, name: str) -> None:
    def train(*, watched: bool) -> tuple[list[float], list[torch.Tensor]]:
        model = mlp()
        groups: list[dict[str, Any]] = [
            {"params": [parameter], "lr": lr}
            for parameter, lr in zip(
                model.parameters(), (torch.tensor(0.1), 0.05, torch.tensor(0.02), 0.01), strict=False
            )
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        seen: list[float] = []
        with watching(run_dir, model, optimizer, actions=[DecayLR()]) as (watcher, _):
            watcher._policy.state.lr_factor = 0.5 if watched else 1.0
            for x, y in data(8):
                optimizer.zero_grad()
                loss = mse(model, x, y)
                loss.backward()
                rates = [group["lr"] for group in optimizer.param_groups]
                for group in optimizer.param_groups if not watched else ():
                    group["lr"] = group["lr"] * 0.5
                optimizer.step()
                for group, before in zip(optimizer.param_groups, rates, strict=True):
                    if not watched:
                        group["lr"] = before
                    assert group["lr"] is before
                scheduler.step(*([loss.detach()] if name == "ReduceLROnPlateau" else []))
                seen += [float(group["lr"]) for group in optimizer.param_groups]
        return seen, [p.detach().clone() for p in model.parameters()]

    rates, weights = train(watched=True)
    by_hand_rates, by_hand = train(watched=False)

    assert rates == by_hand_rates
    torch.testing.assert_close(weights, by_hand, rtol=0, atol=0)
