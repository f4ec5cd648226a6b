"""The path of accelerators on torch's `meta` device, whose tensors have no numbers: whoever reads one fails at once.

Operations that mix it with the host's tensors fail as well, as they would on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from gradwatch.backends.shares import Holding, Union, describe_rank
from gradwatch.backends.torch_device import Transfer
from gradwatch.backends.torch_gradients import Held
from gradwatch.backends.torch_partial import Sums
from gradwatch.integrations.torch_total import Total
from gradwatch.records import Parameter
from tests.torch.loops import IN_STEP, watching


class ToldOnDevice(Optimizer):
    """As a fused optimizer, it is told on the device to leave out a step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "fused": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Descend."""
        factor = 1.0 - getattr(self, "found_inf", torch.zeros((), device="meta"))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * group["lr"] * factor)


@pytest.fixture
def nothing_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied to the host are ones."""
    monkeypatch.setattr(Transfer, "arrived", lambda self: [np.ones(size, np.float32) for size in self._sizes])


@pytest.mark.usefixtures("nothing_arrives")
@pytest.mark.parametrize("actions", IN_STEP, ids=str)
def test_no_number_is_read_and_no_device_is_mixed(run_dir: Path, actions: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to("meta")
    # One that is not fused has to be waited for where steps may be skipped; the documentation says so.
    skips = any(action.name == "SkipStep" for action in actions)
    optimizer = ToldOnDevice(model.parameters()) if skips else SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watching(run_dir, model, optimizer, actions=actions, stats_every=2, activations=True) as (watcher, record):
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(torch.ones(3, 4, device="meta")).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            watcher.log(loss=loss)

    assert watcher.faults.messages == {}
    assert len(record) == 6


def test_sums_over_ranks_read_no_number_and_mix_no_device() -> None:
    parameters = [nn.Parameter(torch.ones(3, 2, device="meta")), nn.Parameter(torch.ones(2, device="meta"))]
    described = [Parameter("weight", shape=(3, 2)), Parameter("bias", shape=(2,))]
    ranks = [describe_rank(described, [Holding((0, 1), (6, 2)), Holding((0, 1), (4,))]) for _ in range(2)]
    summed: list[torch.Tensor] = []
    exchange: Any = SimpleNamespace(met=lambda: True, add_up=summed.append)
    held = Held(parameters, [0, 1], 2, number=0)
    total = Total(exchange, lambda: Union(ranks, 1), parameters, Sums(parameters))
    step: Any = SimpleNamespace(held=held, optimizer=None)
    reading: Any = SimpleNamespace(now=torch.ones(2, device="meta"), coefficient=1.0)

    norms = total.of(step, reading)

    assert (norms.device.type, norms.shape) == ("meta", (2,))
    assert [(line.device.type, line.shape) for line in summed] == [("meta", (2,))]
    assert total.part(held, norms).device.type == "meta"
