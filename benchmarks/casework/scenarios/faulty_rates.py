"""Faults of the update: learning rate, momentum, weight decay, bootstrapping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.casework.case import Training
from benchmarks.casework.networks import VariationalAutoencoder
from benchmarks.casework.scenarios.base import UNIFORM_10, faulty, supervised
from benchmarks.casework.scenarios.parts import (
    Recurrent,
    cnn,
    diabetes,
    digits,
    epochs,
    flat_cross_entropy,
    mlp,
    mnist,
    passages,
    transformer,
)

EXPLODES = ("exploding", "divergence", "nonfinite", "update_ratio", "spike", "oscillation")
LEARNS_NOTHING = (*EXPLODES, "plateau", "stall", "dying_relu", "dead", "vanishing", "saturation")
RATE = ("learning_rate",)


@faulty("exploding", "nan", ends="blow_up", rules=EXPLODES, causes=RATE)
def rate_high_sgd_regression() -> Training:
    """Gradient descent above 2 / lambda_max of a real least-squares problem."""
    model = mlp(10, 32, 1, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.5)
    return supervised(model, optimizer, epochs(*diabetes(), size=64), F.mse_loss, steps=400)


def _mlp_classifier(make: Callable[..., torch.optim.Optimizer], steps: int = 500, **options: float) -> Training:
    model = mlp(64, 64, 64, 64, 10)
    return supervised(model, make(model.parameters(), **options), epochs(*digits(), size=32), steps=steps)


@faulty(
    "exploding", "dying_relu", "stalled", "zero_gradient", "oscillating", "nan",
    ends="stuck", constant=UNIFORM_10, rules=LEARNS_NOTHING, causes=RATE,
)  # fmt: skip
def rate_high_sgd() -> Training:
    return _mlp_classifier(torch.optim.SGD, lr=10.0)


@faulty(
    "exploding", "dying_relu", "stalled", "zero_gradient", "oscillating",
    ends="stuck", constant=UNIFORM_10, rules=LEARNS_NOTHING, causes=RATE,
)  # fmt: skip
def rate_high_adam() -> Training:
    return _mlp_classifier(torch.optim.Adam, lr=0.5)


@faulty(
    "exploding", "dying_relu", "stalled", "zero_gradient", "oscillating",
    ends="stuck", constant=UNIFORM_10, rules=LEARNS_NOTHING, causes=RATE,
)  # fmt: skip
def rate_high_rmsprop() -> Training:
    return _mlp_classifier(torch.optim.RMSprop, lr=0.3)


@faulty(
    "exploding", "dying_relu", "stalled", "zero_gradient", "oscillating",
    ends="stuck", constant=UNIFORM_10, rules=LEARNS_NOTHING, causes=RATE,
)  # fmt: skip
def rate_high_adagrad() -> Training:
    return _mlp_classifier(torch.optim.Adagrad, lr=3.0)


@faulty(
    "exploding", "dying_relu", "stalled", "zero_gradient", "oscillating",
    ends="stuck", constant=UNIFORM_10, rules=LEARNS_NOTHING, causes=RATE,
)  # fmt: skip
def rate_high_cnn_momentum() -> Training:
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    return supervised(model, optimizer, epochs(*mnist(), size=32), steps=300)


@faulty("exploding", "stalled", "oscillating", "nan", ends="stuck", constant=3.0, rules=LEARNS_NOTHING, causes=RATE)
def rate_high_transformer_no_warmup() -> Training:
    model = transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    return supervised(model, optimizer, passages(16, 32), flat_cross_entropy, steps=250)


def _steady_mlp(momentum: float) -> Training:
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=500)


def _steady_cnn() -> Training:
    model = cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(*mnist(), size=32), steps=450)


@faulty(
    "exploding", "nan", "oscillating",
    ends="blow_up", rules=EXPLODES, causes=RATE, twin=lambda: _steady_mlp(0.0),
)  # fmt: skip
def rate_ramp_sgd() -> Training:
    """A scheduler with the wrong sign: the rate grows by 2 % a step from a good one."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=500, rate=lambda k: 0.05 * 1.02**k)


@faulty(
    "exploding", "nan", "oscillating", "dying_relu", "stalled",
    ends="blow_up", rules=LEARNS_NOTHING, causes=RATE, twin=_steady_cnn,
)  # fmt: skip
def rate_ramp_adam_cnn() -> Training:
    model = cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, epochs(*mnist(), size=32), steps=450, rate=lambda k: 1e-3 * 1.025**k)


@faulty(
    "exploding", "nan", "oscillating", "stalled",
    ends="sudden", rules=LEARNS_NOTHING, causes=RATE, twin=lambda: _steady_mlp(0.9),
)  # fmt: skip
def rate_steps_up() -> Training:
    """At step 300 the rate is multiplied by 200 where it should have been divided by ten."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=500, rate=lambda k: 0.05 if k < 300 else 10.0)


@faulty("exploding", "nan", "oscillating", ends="blow_up", rules=EXPLODES, causes=RATE)
def rate_ramp_regression() -> Training:
    model = mlp(10, 32, 1, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    return supervised(
        model, optimizer, epochs(*diabetes(), size=64), F.mse_loss, steps=500, rate=lambda k: 0.02 * 1.015**k
    )


@faulty(
    "exploding", "nan", "oscillating", "dying_relu", "stalled",
    ends="stuck", constant=UNIFORM_10, rules=LEARNS_NOTHING, causes=RATE,
)  # fmt: skip
def momentum_too_high() -> Training:
    """Momentum 0.999 piles up a thousand gradients: stable for a while, then swinging ever wider."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.999)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=800)


@faulty("exploding", "nan", "oscillating", ends="blow_up", rules=EXPLODES, causes=RATE)
def quadratic_just_unstable() -> Training:
    """2 % above the stability limit of full-batch least squares: the error grows by 4 % a step."""
    basis = torch.linalg.qr(torch.randn(128, 10))[0]
    x = basis * (128 * torch.linspace(0.05, 1, 10)).sqrt()
    y = x @ torch.randn(10, 1) + 0.5 * torch.randn(128, 1)
    model = nn.Linear(10, 1, bias=False)

    def half_mse(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * F.mse_loss(output, target)

    optimizer = torch.optim.SGD(model.parameters(), lr=2.04)
    return supervised(model, optimizer, epochs(x, y, size=128), half_mse, steps=600)


@faulty(
    "exploding",
    "nan",
    ends="blow_up",
    rules=EXPLODES,
    causes=("weight_decay", "learning_rate"),
    beyond="program: the optimizer's weight decay undoes what gradients do to the weights",
)
def weight_decay_explodes() -> Training:
    """Decay 25 with rate 0.1 multiplies every weight by -1.5 at each step."""
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=25.0)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=400)


@faulty(
    "vanishing", "stalled", "zero_gradient",
    ends="stuck", constant=UNIFORM_10,
    rules=("vanishing", "dead", "plateau", "stall", "imbalance", "update_ratio"),
    causes=("weight_decay",),
    beyond="program: the optimizer's weight decay undoes what gradients do to the weights",
)  # fmt: skip
def weight_decay_collapses() -> Training:
    """Decay so strong that the weights shrink to nothing and the signal with them."""
    model = mlp(64, 64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1.0)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=600)


@faulty(
    "exploding",
    "nan",
    ends="blow_up",
    rules=EXPLODES,
    causes=("learning_rate",),
    beyond="program: off-policy bootstrapping diverges at every rate",
)
def bootstrapped_values_diverge() -> Training:
    """Sutton & Barto 2018, section 11.2: off-policy bootstrapping with function approximation (Baird's star)."""
    features = torch.cat([2 * torch.eye(7), torch.zeros(7, 1)], dim=1)
    features[6] = 0.0
    features[6, 6] = 1.0
    features[:6, 7] = 1.0
    features[6, 7] = 2.0
    value = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        value.weight.copy_(torch.tensor([[1.0, 1, 1, 1, 1, 1, 10, 1]]) + 0.1 * torch.randn(1, 8))

    def step(k: int) -> Tensor:
        states = features[torch.randint(7, (16,))]
        target = 0.99 * value(features[6:7]).detach()
        loss = 0.5 * F.mse_loss(value(states), target.expand(16, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    optimizer = torch.optim.SGD(value.parameters(), lr=0.1)
    return Training(value, optimizer, step, 1500)


@faulty("exploding", "nan", "oscillating", ends="blow_up", rules=EXPLODES, causes=("learning_rate", "data_scale"))
def vae_variance_overflows() -> Training:
    """Plain SGD on a summed loss: exp(log variance) leaves the range of float32."""
    x = mnist()[0].flatten(1)
    model = VariationalAutoencoder(784, hidden=96, latent=8)

    def loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        picture, mean, log_variance = output
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return F.mse_loss(picture, target, reduction="sum") + divergence

    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    return supervised(model, optimizer, epochs(x, x, size=64), loss, steps=250)


@faulty("exploding", "nan", ends="blow_up", rules=EXPLODES, causes=("learning_rate", "data_scale"))
def summed_loss_keeps_mean_rate() -> Training:
    """The loss is summed over the batch but the rate was chosen for the mean."""
    model = mlp(10, 32, 1)

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return supervised(model, optimizer, epochs(*diabetes(), size=64), summed, steps=200)


@faulty(
    "exploding", "stalled", "oscillating",
    ends="stuck", constant=UNIFORM_10, rules=LEARNS_NOTHING, causes=RATE,
)  # fmt: skip
def lstm_rate_high() -> Training:
    x, y = digits()
    model = Recurrent(nn.LSTM, 8, 48, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=60.0, momentum=0.9)
    return supervised(model, optimizer, epochs(x.reshape(-1, 8, 8), y, size=32), steps=300)


@faulty(
    "exploding", "oscillating", "stalled", "dying_relu", "zero_gradient",
    ends="stuck", constant=UNIFORM_10, rules=LEARNS_NOTHING, causes=RATE,
)  # fmt: skip
def one_group_rate_high() -> Training:
    """The last layer's parameter group has a rate a thousand times the others'."""
    model = mlp(64, 64, 64, 10)
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters()},
        {"params": model[4].parameters(), "lr": 50.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    return supervised(model, optimizer, epochs(*digits(), size=32), steps=400)


@faulty("exploding", "oscillating", "nan", ends="blow_up", rules=EXPLODES, causes=RATE)
def cycles_with_growing_peak() -> Training:
    """A cyclic schedule whose peak doubles at each cycle."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def rate(k: int) -> float:
        cycle, place = divmod(k, 60)
        return 0.01 + 0.02 * 2.0**cycle * math.sin(math.pi * place / 60)

    return supervised(model, optimizer, epochs(*digits(), size=32), steps=600, rate=rate)
