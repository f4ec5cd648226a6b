"""The same small model, data and loop that every trainer is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import gradwatch as gw

STEPS = 12
BATCH = 8
RATE = 0.1


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 6, generator=generator)
    return x, x.sum(dim=1, keepdim=True)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def train(run_dir: Path, *, accumulate: int = 1, max_norm: float | None = None, **settings: Any) -> nn.Sequential:
    """The plain loop, watched; `max_norm` clips as a user would."""
    net, (x, y) = model(), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    with gw.watch(net, optimizer, run_dir=run_dir, **settings) as watcher:
        for step in range(STEPS):
            rows = slice(step * BATCH, (step + 1) * BATCH)
            loss = loss_of(net(x[rows]), y[rows])
            (loss / accumulate).backward()
            if (step + 1) % accumulate == 0:
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), max_norm)
                optimizer.step()
                watcher.log(loss=loss)
                optimizer.zero_grad()
    return net


def norms(run_dir: Path) -> npt.NDArray[np.float32]:
    """What was recorded, steps by parameters."""
    return gw.load(run_dir).grad_norms().to_numpy()


def losses(run_dir: Path) -> npt.NDArray[np.float64]:
    """What was logged as the loss of each step."""
    return gw.load(run_dir).metrics()["loss"].to_numpy(np.float64)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
