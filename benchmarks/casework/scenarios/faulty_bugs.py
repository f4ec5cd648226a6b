"""Faults of the program: parts left out, gradients not cleared, slow drifts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.casework.case import Training
from benchmarks.casework.scenarios.base import UNIFORM_10, faulty, healthy, supervised
from benchmarks.casework.scenarios.parts import digits, epochs, mlp

UNUSED = ("unused_layers",)


class WithSpare(nn.Module):
    """A network with a second branch that `forward` forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(64, 64, 32)
        self.branch = nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.trunk(x).relu())
        return out


@faulty("zero_gradient", "vanishing", ends="silent", rules=("unused",), causes=UNUSED)
def layer_never_called() -> Training:
    model = WithSpare()
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), epochs(*digits(), size=32), steps=300)


class Detached(nn.Module):
    """An encoder behind a `.detach()` that was left from a debugging session."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).detach())
        return out


@faulty("zero_gradient", "vanishing", ends="silent", rules=("unused",), causes=UNUSED)
def encoder_detached() -> Training:
    model = Detached()
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), epochs(*digits(), size=32), steps=300)


class Gated(nn.Module):
    """A branch times a gate that is exactly zero and not trained: its gradient is exactly zero, not absent."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.branch = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.trunk(x) + self.gate * self.branch(x))
        return out


@faulty("zero_gradient", "vanishing", "dying_relu", ends="silent", rules=("dead", "unused"), causes=UNUSED)
def branch_gated_off() -> Training:
    model = Gated()
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), epochs(*digits(), size=32), steps=300)


@faulty(
    "zero_gradient", "vanishing", "stalled",
    ends="stuck", rules=("dead", "vanishing", "plateau", "stall"), causes=("output_layer",),
    beyond="architecture: a softmax over one unit has no gradient",
)  # fmt: skip
def softmax_over_one_unit() -> Training:
    """A softmax over a single output is always 1: no gradient reaches anything."""
    x, y = digits()
    model = nn.Sequential(mlp(64, 32, 1), nn.Softmax(dim=1))
    target = (y < 5).float()[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(x, target, size=32), F.mse_loss, steps=300)


@faulty(
    "exploding", "oscillating", "stalled", "nan", "dying_relu", "zero_gradient",
    ends="stuck", constant=UNIFORM_10,
    rules=("exploding", "oscillation", "update_ratio", "divergence", "spike", "nonfinite", "plateau", "dead"),
    causes=("gradients_not_cleared",),
    beyond="program: each gradient holds all before it until the loop clears them",
)  # fmt: skip
def gradients_never_cleared() -> Training:
    """`zero_grad` was forgotten: each gradient is added to all before it."""
    model = mlp(64, 64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=800, clear=False)


@faulty(
    "stalled", "vanishing",
    ends="stuck", constant=UNIFORM_10, rules=("stall", "update_ratio", "plateau"), causes=("learning_rate_small",),
)  # fmt: skip
def rate_far_too_small() -> Training:
    """1e-7 where 1e-1 was meant."""
    model = mlp(64, 64, 64, 10)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=1e-7), epochs(*digits(), size=32), steps=400)


#: Step at which the drifting layer starts to drift.
DRIFT_START = 300


def drift(layer: int, growth: float) -> Training:
    """A healthy run in which the gradient of one layer grows by `growth` a step for 250 steps and nothing else does.

    The layer's own rate falls as its gradient grows, so its weights and the other layers train on as before.
    """
    model = mlp(64, 64, 64, 64, 10)
    weight = [module for module in model if isinstance(module, nn.Linear)][layer].weight
    others = [parameter for parameter in model.parameters() if parameter is not weight]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": [weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    factor = 1.0

    def tilt(k: int) -> None:
        nonlocal factor
        factor = growth ** min(max(0, k - DRIFT_START), 250)
        optimizer.param_groups[1]["lr"] = 0.1 / factor

    # In the backward pass: what a loop does to a gradient after it is taken for its clipping.
    weight.register_hook(lambda gradient: gradient * factor)

    return supervised(model, optimizer, epochs(*digits(), size=64), steps=DRIFT_START + 300, before_step=tilt)


DRIFT = "drift-up-3-percent", "drift-down-3-percent", "drift-none"
faulty("exploding", ends="silent", rules=("exploding",), causes=("drift",), name=DRIFT[0], layer=1, growth=1.03)(drift)
faulty("vanishing", ends="silent", rules=("vanishing",), causes=("drift",), name=DRIFT[1], layer=2, growth=0.971)(drift)
healthy(name=DRIFT[2], layer=1, growth=1.0)(drift)
