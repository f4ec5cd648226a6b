"""The hot path does no work per parameter in Python: counted in calls, which no load of the machine changes.

`benchmarks/hot_path.py` counts more, and holds it against a baseline.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch.watcher
from gradwatch.actions import Clip
from gradwatch.integrations.torch_watch import watch_torch

#: Steps counted: whole blocks of those that are looked at together.
STEPS = 24
#: Python functions that a watched step calls beyond an unwatched one: recording, with the detectors, with Clip as well.
#: Measured 74, 113 and 144 with Python 3.11; a tenth above is a regression.
MOST_RECORDING, MOST_DETECTING, MOST_CLIPPING = 82, 124, 158


def _calls(step: Callable[[], None]) -> float:
    """Calls of Python functions in a step."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    for _ in range(13):
        step()
    sys.setprofile(note)
    for _ in range(STEPS):
        step()
    sys.setprofile(None)
    return count / STEPS


def _added(run_dir: Path, layers: int, *, clips: bool = False, **settings: Any) -> float:
    """Calls that watching, or clipping, adds to a step of a model of so many layers."""
    counts = []
    for is_other in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
            nn.init.eye_(layer.weight)  # so that no gradient is too small for float32, which costs a second look
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x = torch.randn(2, 4)

        def step(
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            x: torch.Tensor = x,
            *,
            clips: bool = clips and is_other,
        ) -> None:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()

        if is_other and not clips:
            with watch_torch(model, optimizer, run_dir=run_dir, stats_every=10**6, **settings):
                counts.append(_calls(step))
        else:
            counts.append(_calls(step))
    return counts[1] - counts[0]


@pytest.fixture(autouse=True)
def whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step under a profile is slow; without this it would be looked at alone."""
    monkeypatch.setattr(gradwatch.watcher, "LATEST", math.inf)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"detectors": []}, MOST_RECORDING),
        ({}, MOST_DETECTING),
        ({"actions": [Clip(max_norm=1e9)]}, MOST_CLIPPING),
    ],
    ids=["record", "record and detect", "record, detect and clip"],
)
def test_a_step_costs_as_many_calls_for_two_hundred_tensors_as_for_ten(
    run_dir: Path, tmp_path: Path, settings: dict[str, Any], most: int
) -> None:
    few = _added(run_dir, 5, **settings)
    many = _added(tmp_path / "many", 100, **settings)
    assert many <= few + 10
    assert many <= most


def test_recording_detecting_and_clipping_calls_less_than_clipping_alone(run_dir: Path, tmp_path: Path) -> None:
    assert _added(run_dir, 100, actions=[Clip(max_norm=1e9)]) < 0.2 * _added(tmp_path / "clip", 100, clips=True)


def test_a_step_leaves_no_object_behind(run_dir: Path) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(2, 4)
    counts = []
    with watch_torch(model, optimizer, run_dir=run_dir, flush_every=48) as watcher:
        for step in range(241):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            watcher.log(loss=loss)
            if step in (120, 240):
                gc.collect()
                counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 120
