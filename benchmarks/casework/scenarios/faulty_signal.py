"""Faults of the network: gain of the initialisation, activations, recurrence, missing normalisation, attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.casework import data
from benchmarks.casework.case import Training
from benchmarks.casework.networks import Exponential, PlainRecurrence
from benchmarks.casework.scenarios.base import UNIFORM_10, faulty, supervised
from benchmarks.casework.scenarios.parts import (
    Residual,
    diabetes,
    digits,
    epochs,
    flat_cross_entropy,
    mlp,
    mnist,
    passages,
    set_gain,
    transformer,
)

VANISHES = ("vanishing", "imbalance", "dead", "saturation", "plateau", "stall", "dying_relu", "update_ratio")
EXPLODES = ("exploding", "imbalance", "divergence", "nonfinite", "update_ratio", "spike")


@faulty(
    "vanishing", "stalled", "zero_gradient", ends="stuck", constant=UNIFORM_10, rules=VANISHES, causes=("init_small",)
)
def gain_small_relu() -> Training:
    """Half of Kaiming's variance over 15 layers: the backward signal shrinks by 0.7 a layer."""
    model = set_gain(mlp(64, *[96] * 15, 10), 0.6)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.01), epochs(*digits(), size=32), steps=400)


@faulty(
    "vanishing", "stalled", "zero_gradient",
    ends="stuck", constant=UNIFORM_10, rules=VANISHES, causes=("init_small", "missing_normalisation"),
)  # fmt: skip
def default_init_plain_30_layers() -> Training:
    """PyTorch's default for Linear in a plain ReLU network of 30 layers: no normalisation, no shortcut, no signal."""
    model = mlp(64, *[64] * 30, 10)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.05), epochs(*digits(), size=32), steps=400)


@faulty("exploding", "nan", ends="blow_up", rules=EXPLODES, causes=("init_large",))
def gain_large_relu() -> Training:
    """Eight times the variance per layer over 12 layers."""
    model = set_gain(mlp(10, *[64] * 12, 1), 8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    return supervised(model, optimizer, epochs(*diabetes(), size=64), F.mse_loss, steps=200)


@faulty(
    "exploding", "nan", "stalled", "oscillating", "dying_relu", "zero_gradient",
    ends="stuck", constant=UNIFORM_10, rules=(*EXPLODES, *VANISHES), causes=("init_large",),
)  # fmt: skip
def gain_large_classifier() -> Training:
    model = set_gain(mlp(64, *[96] * 12, 10), 5.0)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.01), epochs(*digits(), size=32), steps=300)


@faulty(
    "exploding", "stalled", "oscillating", "vanishing",
    ends="stuck", constant=UNIFORM_10, rules=(*EXPLODES, *VANISHES), causes=("init_large", "saturating_activation"),
)  # fmt: skip
def chaotic_tanh() -> Training:
    """Deep in the chaotic phase (Schoenholz et al. 2017) every layer is saturated."""
    model = set_gain(mlp(64, *[96] * 30, 10, activation=nn.Tanh), 9.0, bias=0.2236)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.01), epochs(*digits(), size=32), steps=400)


@faulty("vanishing", "stalled", ends="stuck", constant=UNIFORM_10, rules=VANISHES, causes=("saturating_activation",))
def deep_sigmoid() -> Training:
    model = mlp(64, *[64] * 9, 10, activation=nn.Sigmoid)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs(*digits(), size=32), steps=500)


@faulty("vanishing", "stalled", ends="stuck", constant=UNIFORM_10, rules=VANISHES, causes=("saturating_activation",))
def deep_sigmoid_adam() -> Training:
    model = mlp(64, *[32] * 12, 10, activation=nn.Sigmoid)
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), epochs(*digits(), size=32), steps=500)


@faulty(
    "vanishing", "stalled", "zero_gradient",
    ends="stuck", constant=0.25, rules=VANISHES, causes=("saturating_activation", "data_scale", "init_large"),
)  # fmt: skip
def saturated_sigmoid_output() -> Training:
    """Squared loss on a sigmoid that starts far out in its flat part."""
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    nn.init.constant_(dict(model.named_parameters())["2.bias"], 18.0)
    target = (y < 5).float()[:, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return supervised(model, optimizer, epochs(x, target, size=32), F.mse_loss, steps=500)


@faulty(
    "vanishing", "stalled",
    ends="stuck", constant=UNIFORM_10, rules=VANISHES, causes=("saturating_activation", "data_scale"),
)  # fmt: skip
def tanh_saturated_by_inputs() -> Training:
    """Raw pixels 0..255 drive every tanh unit to its end at once."""
    x, y = mnist()
    model = mlp(784, 64, 64, 64, 10, activation=nn.Tanh)
    set_gain(model, 2.0)
    data_in = (x * 255).flatten(1) * 10
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    return supervised(model, optimizer, epochs(data_in, y, size=32), steps=400)


@faulty(
    "dying_relu", "zero_gradient", "vanishing", "stalled",
    ends="stuck", constant=UNIFORM_10, rules=("dying_relu", "dead", "vanishing", "plateau", "stall"),
    causes=("dying_relu",),
)  # fmt: skip
def relu_born_dead() -> Training:
    """A bias of -8 in the second layer: no unit is ever active."""
    model = mlp(64, 64, 64, 10)
    nn.init.constant_(dict(model.named_parameters())["2.bias"], -8.0)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs(*digits(), size=32), steps=400)


@faulty(
    "dying_relu", "zero_gradient", "exploding", "stalled",
    ends="stuck", constant=UNIFORM_10, rules=("dying_relu", "dead", "spike", "exploding", "update_ratio", "plateau"),
    causes=("dying_relu", "learning_rate"),
)  # fmt: skip
def relu_killed_by_one_update() -> Training:
    """A single update with a rate of 300 at step 200 pushes all units below zero for good."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return supervised(
        model, optimizer, epochs(*digits(), size=32), steps=500, rate=lambda k: 300.0 if k == 200 else 0.05
    )


@faulty(
    "zero_gradient", "dying_relu", "vanishing", "stalled",
    ends="stuck", rules=("dead", "dying_relu", "vanishing", "plateau", "stall"), causes=("dying_relu",),
    beyond="architecture: a ReLU at the output cannot reach negative targets",
)  # fmt: skip
def relu_output_for_negative_targets() -> Training:
    """ReLU as the last layer of a regression whose targets are all below zero."""
    x, y = diabetes()
    model = nn.Sequential(mlp(10, 32, 1), nn.ReLU())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return supervised(model, optimizer, epochs(x, y - 5, size=64), F.mse_loss, steps=500)


@faulty(
    "exploding", "nan", ends="blow_up", rules=EXPLODES, causes=("activation", "init_large", "saturating_activation")
)
def exponential_activation() -> Training:
    model = mlp(10, 16, 16, 16, 16, 16, 1, activation=Exponential)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(*diabetes(), size=64), F.mse_loss, steps=200)


class Recurrence(nn.Module):
    """A plain recurrence whose matrix has spectral radius `rho`, and its readout."""

    def __init__(self, rho: float, activation: str) -> None:
        super().__init__()
        self.cell = PlainRecurrence(2, {"n": 48, "rho": rho, "act": activation})
        self.head = nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x))
        return out


def _adding(rho: float, activation: str, rate: float) -> Training:
    arrays = data.load({"name": "adding", "T": 40}, int(torch.initial_seed() % 2**31))
    x, y = (torch.tensor(array, dtype=torch.float32) for array in arrays)
    model = Recurrence(rho, activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return supervised(model, optimizer, epochs(x, y, size=64), F.mse_loss, steps=200)


@faulty("exploding", "nan", ends="blow_up", rules=EXPLODES, causes=("recurrence",))
def recurrence_radius_large() -> Training:
    """Pascanu et al. 2013: radius 2.2 over 40 steps multiplies the state by about 1.5 each time."""
    return _adding(2.2, "relu", 1e-3)


@faulty(
    "exploding", "stalled", "oscillating",
    ends="stuck", constant=0.17, rules=(*EXPLODES, *VANISHES), causes=("recurrence", "saturating_activation"),
    twin=lambda: _adding(1.0, "tanh", 1e-2),
)  # fmt: skip
def recurrence_tanh_chaotic() -> Training:
    return _adding(6.0, "tanh", 1e-2)


@faulty("exploding", "nan", "stalled", ends="blow_up", rules=EXPLODES, causes=("missing_normalisation", "init_large"))
def residual_without_norm() -> Training:
    """Forty residual blocks, unit gain each, no normalisation: variance doubles at every block."""
    blocks = [Residual(set_gain(nn.Sequential(nn.Linear(48, 48), nn.ReLU()), 4.0)) for _ in range(40)]
    model = nn.Sequential(nn.Linear(10, 48), *blocks, nn.Linear(48, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    return supervised(model, optimizer, epochs(*diabetes(), size=64), F.mse_loss, steps=100)


@faulty(
    "exploding", "stalled", "oscillating", "nan",
    ends="stuck", constant=3.3, rules=(*EXPLODES, *VANISHES), causes=("attention_logits", "init_large"),
)  # fmt: skip
def attention_logits_huge() -> Training:
    """Query and key weights fifty times too large: the softmax is one-hot from the start."""
    model = transformer(std=0.02)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "qkv" in name:
                weight.mul_(150.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return supervised(model, optimizer, passages(16, 32), flat_cross_entropy, steps=200)


@faulty(
    "exploding", "stalled", "oscillating",
    ends="stuck", constant=3.3, rules=(*EXPLODES, *VANISHES), causes=("init_large",),
)  # fmt: skip
def transformer_init_unit_variance() -> Training:
    """N(0, 1) where N(0, 0.02) was meant: a starting loss of hundreds."""
    model = transformer(std=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, passages(16, 32), flat_cross_entropy, steps=200)


@faulty(
    "zero_gradient", "vanishing", "stalled",
    ends="stuck", constant=UNIFORM_10, rules=("dead", "vanishing", "unused", "plateau", "stall"),
    causes=("init_small",),
)  # fmt: skip
def all_weights_zero() -> Training:
    """Only the last bias ever moves."""
    model = mlp(64, 64, 64, 10)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), epochs(*digits(), size=32), steps=500)


@faulty(
    "vanishing", "stalled", "zero_gradient",
    ends="silent", rules=("vanishing", "imbalance", "dead", "saturation", "plateau", "stall", "divergence"),
    causes=("saturating_activation", "loss_domain"),
)  # fmt: skip
def saturating_gan_loss() -> Training:
    """Goodfellow et al. 2014: log(1 - D(G(z))) gives no gradient once the discriminator wins, which it does at once."""
    model = nn.ModuleDict(
        {
            "generator": nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid()),
            "discriminator": nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Sigmoid()),
        }
    )
    first = torch.optim.Adam(model["discriminator"].parameters(), lr=1e-2)
    second = torch.optim.SGD(model["generator"].parameters(), lr=1e-3)
    batches = epochs(digits()[0], size=64)

    def step(k: int) -> Tensor:
        (real,) = next(batches)
        fake = model["generator"](torch.randn(64, 16))
        first.zero_grad()
        right = model["discriminator"](real).clamp(1e-7, 1).log()
        doubt = -(right + (1 - model["discriminator"](fake.detach())).clamp(1e-7, 1).log()).mean()
        doubt.backward()
        first.step()
        second.zero_grad()
        saved = (1 - model["discriminator"](fake)).clamp(1e-7, 1).log().mean()
        saved.backward()
        second.step()
        loss: Tensor = (doubt + saved).detach() + math.log(4)
        return loss

    return Training(model, [first, second], step, 500)
