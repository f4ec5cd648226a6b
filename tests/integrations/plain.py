"""The same small model, data and loop that every trainer is held against."""

from __future__ import annotations

import math
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


class Poisoned(nn.Module):
    """The model, whose output is NaN at one of its calls."""

    def __init__(self, bad: int = 5) -> None:
        super().__init__()
        self.net, self.bad, self.calls = model(), bad, 0

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        self.calls += 1
        output: Tensor = self.net(x)
        return output * math.nan if self.calls - 1 == self.bad else output


def was_decayed(run_dir: Path, rate: float) -> bool:
    """Whether a `DecayLR` was the first remedy, the rates in the record stayed the user's, and the updates shrank."""
    run = gw.load(run_dir)
    metrics, sampled = run.metrics(), run.statistic("update_ratio").dropna().index
    name = run.grad_norms().columns[0]
    change = run.statistic("update_ratio")[name] * run.statistic("weight_norm")[name] / run.grad_norms()[name]
    sane = [step for step in sampled if metrics["loss"][step] < 1e3 and np.isfinite(change[step])]
    np.testing.assert_allclose(change[sane], rate * metrics["lr_factor"][sane], rtol=1e-3)
    np.testing.assert_allclose(metrics["lr"], rate)
    return run.action_list()[0].action == "DecayLR" and bool(metrics["lr_factor"].min() <= 0.5)


def assert_clipped_to(run_dir: Path, max_norm: float) -> None:
    """The recorded coefficients are those by which `clip_grad_norm_` comes to this norm."""
    metrics = gw.load(run_dir).metrics()
    coefficients = np.minimum(max_norm / metrics["global_norm"], 1.0)
    np.testing.assert_allclose(metrics["clip_coefficient"], coefficients, rtol=1e-5)


def skipped(run_dir: Path) -> list[int]:
    """The steps that were skipped."""
    metrics = gw.load(run_dir).metrics()
    return list(metrics.index[metrics["skipped"] > 0])


def norms(run_dir: Path) -> npt.NDArray[np.float32]:
    """What was recorded, steps by parameters."""
    return gw.load(run_dir).grad_norms().to_numpy()


def losses(run_dir: Path) -> npt.NDArray[np.float64]:
    """What was logged as the loss of each step."""
    return gw.load(run_dir).metrics()["loss"].to_numpy(np.float64)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
