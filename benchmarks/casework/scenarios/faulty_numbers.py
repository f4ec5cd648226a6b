"""Faults of numbers: bad batches, scales of data, the domain of the loss, half precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.casework import data
from benchmarks.casework.case import Training
from benchmarks.casework.scenarios.base import UNIFORM_10, Batches, faulty, supervised
from benchmarks.casework.scenarios.parts import cnn, diabetes, digits, epochs, mlp, mnist

BREAKS = ("nonfinite", "exploding", "divergence", "spike", "update_ratio")
STALLS = ("vanishing", "plateau", "stall", "underflow", "dead", "update_ratio", "dying_relu", "oscillation")


def poisoned(batches: Batches, *, every: int, first: int, harm: float) -> Batches:
    """One batch of each epoch of `every` batches has inputs times `harm`."""
    for number, (inputs, targets) in enumerate(batches):
        yield (inputs * harm, targets) if number >= first and (number - first) % every == 0 else (inputs, targets)


@faulty("nan", "exploding", ends="sudden", rules=("nonfinite",), causes=("bad_batch",))
def bad_batch_nan() -> Training:
    """One sample holds NaN; from then on the weights do."""
    model = mlp(64, 64, 64, 10)
    batches = poisoned(epochs(*digits(), size=32), every=10**9, first=237, harm=float("nan"))
    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), batches, steps=300)


@faulty(
    "exploding", "oscillating",
    ends="silent", rules=("spike", "exploding", "divergence", "update_ratio", "oscillation"), causes=("bad_batch",),
)  # fmt: skip
def bad_batch_huge_every_epoch() -> Training:
    """The same damaged file once an epoch: inputs a thousand times too large."""
    model = mlp(64, 64, 64, 10)
    batches = poisoned(epochs(*digits(), size=32), every=56, first=100, harm=1000.0)
    return supervised(model, torch.optim.SGD(model.parameters(), lr=0.01), batches, steps=600)


@faulty("nan", "exploding", ends="silent", rules=("nonfinite",), causes=("bad_batch",))
def bad_batch_nan_skipped_by_user() -> Training:
    """The loop guards itself and leaves out the update when the loss is not finite, once an epoch, for ever."""
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = poisoned(epochs(*mnist(), size=32), every=125, first=60, harm=float("nan"))

    def step(k: int) -> Tensor:
        inputs, targets = next(batches)
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        if loss.isfinite():
            optimizer.step()
        return loss.detach()

    return Training(model, optimizer, step, 400)


@faulty(
    "exploding",
    "oscillating",
    ends="silent",
    rules=("spike", "exploding", "divergence"),
    causes=("bad_batch", "data_scale"),
)
def corrupt_targets_every_epoch() -> Training:
    """Missing values that were written as 9999 in the targets of one batch an epoch."""
    x, y = diabetes()
    model = mlp(10, 32, 1)

    def batches() -> Batches:
        for number, (inputs, targets) in enumerate(epochs(x, y, size=16)):
            yield (inputs, torch.full_like(targets, 9999.0)) if number % 27 == 20 else (inputs, targets)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return supervised(model, optimizer, batches(), F.mse_loss, steps=500)


@faulty("nan", "exploding", ends="sudden", rules=BREAKS, causes=("loss_domain",))
def log_of_zero() -> Training:
    """Binary cross-entropy by hand: once a sigmoid rounds to 1, the loss is 0 times minus infinity."""
    x, y = digits()
    chosen = y < 2
    model = mlp(64, 32, 1)

    def by_hand(output: Tensor, target: Tensor) -> Tensor:
        p, t = output.sigmoid(), target[:, None]
        return -(t * p.log() + (1 - t) * (1 - p).log()).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return supervised(model, optimizer, epochs(x[chosen], y[chosen], size=16), by_hand, steps=600)


@faulty("nan", "exploding", ends="sudden", rules=("nonfinite",), causes=("loss_domain",))
def root_of_zero() -> Training:
    """The gradient of a distance is 0/0 where two embeddings coincide."""
    x, _ = digits()
    model = mlp(64, 32, 8)

    def distance(output: Tensor, target: Tensor) -> Tensor:
        pairs = output[0::2] - output[1::2]
        return pairs.square().sum(1).sqrt().mean()

    def batches() -> Batches:
        for number, (inputs,) in enumerate(epochs(x, size=32)):
            pairs = inputs if number < 80 else torch.cat([inputs[:1], inputs[:1], inputs[2:]])
            yield pairs, pairs

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    return supervised(model, optimizer, batches(), distance, steps=150)


@faulty("nan", "exploding", ends="sudden", rules=BREAKS, causes=("loss_domain", "bad_batch"))
def division_by_zero() -> Training:
    """A loss normalised by the batch's standard deviation, and at step 150 a batch of equal targets."""
    x, y = diabetes()
    model = mlp(10, 32, 1)

    def normalised(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) / target.std()).square().mean()

    def batches() -> Batches:
        for number, (inputs, targets) in enumerate(epochs(x, y, size=16)):
            yield (inputs, targets[:1].expand(16, 1)) if number == 150 else (inputs, targets)

    return supervised(model, torch.optim.Adam(model.parameters(), lr=1e-3), batches(), normalised, steps=250)


@faulty(
    "exploding", "nan", "dying_relu", "stalled", "zero_gradient",
    ends="stuck", constant=UNIFORM_10, rules=(*BREAKS, *STALLS), causes=("data_scale", "learning_rate"),
)  # fmt: skip
def inputs_not_scaled() -> Training:
    """Pixels 0..255 with a rate that suits 0..1."""
    x, y = mnist()
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return supervised(model, optimizer, epochs(x * 255, y, size=32), steps=300)


@faulty("exploding", "nan", ends="blow_up", rules=BREAKS, causes=("data_scale", "learning_rate"))
def targets_not_scaled() -> Training:
    """Prices in the hundred thousands under a squared loss."""
    x, y = diabetes()
    model = mlp(10, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return supervised(model, optimizer, epochs(x, 1e5 * (y + 3), size=32), F.mse_loss, steps=200)


@faulty("exploding", "nan", ends="blow_up", rules=BREAKS, causes=("data_scale", "learning_rate"))
def features_not_scaled() -> Training:
    """Auto-MPG as it comes: weight in thousands of pounds beside the number of cylinders."""
    arrays = data.load({"name": "autompg", "raw_x": True, "raw_y": 1.0}, 0)
    x, y = (torch.tensor(array, dtype=torch.float32) for array in arrays)
    model = mlp(9, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return supervised(model, optimizer, epochs(x, y, size=32), F.mse_loss, steps=200)


@faulty(
    "nan",
    "exploding",
    ends="blow_up",
    rules=("nonfinite",),
    causes=("half_overflow",),
    beyond="precision: a fixed loss scale in the loop sends gradients out of float16's range",
)
def float16_overflow() -> Training:
    """All in float16 with a fixed loss scale of 2**20: the gradients leave the range at 65504."""
    x, y = digits()
    model = mlp(64, 64, 64, 10).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 / 2**20)
    batches = epochs(x.half(), y, size=32)

    def step(k: int) -> Tensor:
        inputs, targets = next(batches)
        loss = F.cross_entropy(model(inputs).float(), targets)
        optimizer.zero_grad()
        (loss * 2.0**20).backward()
        optimizer.step()
        return loss.detach()

    return Training(model, optimizer, step, 100)


@faulty(
    "vanishing", "zero_gradient", "stalled",
    ends="stuck", constant=UNIFORM_10, rules=("underflow", *STALLS, "unused"), causes=("half_underflow",),
    beyond="precision: gradients flush to zero in float16",
)  # fmt: skip
def float16_underflow() -> Training:
    """A loss divided by 4096 (pixels of a dense task) in float16 without scaling: gradients flush to zero."""
    x, y = digits()
    model = halved(mlp(64, 64, 64, 64, 10)).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) / 64 / 64

    return supervised(model, optimizer, epochs(x.half(), y, size=32), loss, steps=400)


def halved(model: nn.Module) -> nn.Module:
    """Weights half as large as PyTorch's default."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


@faulty(
    "stalled", "vanishing",
    ends="stuck", rules=("stall", "update_ratio", "plateau", "underflow"), causes=("half_underflow",),
)  # fmt: skip
def bfloat16_updates_lost() -> Training:
    """bfloat16 weights keep eight bits: an update below 0.4 % of a weight rounds to nothing."""
    x, y = digits()
    model = mlp(64, 64, 64, 10).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)

    return supervised(model, optimizer, epochs(x.bfloat16(), y, size=32), loss, steps=500)
