"""The hot path does no work per parameter in Python: counted in calls, which no load of the machine changes."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch.actions import Clip
from tests.torch.loops import watching

#: What a watched step calls beyond an unwatched one. Measured 382; more than a third above is a regression.
MOST_CALLS = 510


def _calls(step: Callable[[], None]) -> float:
    """Function calls of a step, the mean over twenty."""
    for _ in range(11):
        step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(20):
        step()
    profile.disable()
    return float(pstats.Stats(profile).total_calls) / 20  # type: ignore[attr-defined]


def _added(run_dir: Path, layers: int, **settings: Any) -> float:
    """Calls that watching adds to a step of a model of so many layers."""
    counts = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
            nn.init.eye_(layer.weight)  # so that no gradient is too small for float32, which costs a second look
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x = torch.randn(2, 4)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer, x: torch.Tensor = x) -> None:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

        if is_watched:
            with watching(run_dir, model, optimizer, stats_every=10**6, **settings):
                counts.append(_calls(step))
        else:
            counts.append(_calls(step))
    return counts[1] - counts[0]


@pytest.mark.parametrize("actions", [[], [Clip(max_norm=1e9)]], ids=["record", "record and clip"])
def test_a_step_costs_as_many_calls_for_two_hundred_tensors_as_for_ten(
    run_dir: Path, tmp_path: Path, actions: list[Any]
) -> None:
    few = _added(run_dir, 5, actions=actions)
    many = _added(tmp_path / "many", 100, actions=actions)
    assert many <= few + 10
    assert many <= MOST_CALLS
