"""Data, networks and schedules that several scenarios share."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.casework import data
from benchmarks.casework.networks import CharacterModel

Batches = Iterator[tuple[Tensor, ...]]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: (1797, 64) in [0, 1], labels (1797,)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """4,000 MNIST digits: (4000, 1, 28, 28) in [0, 1], labels (4000,)."""
    pixels, labels = data.mnist_digits()
    return torch.tensor(pixels / 255, dtype=torch.float32).reshape(-1, 1, 28, 28), torch.tensor(labels)


@functools.cache
def diabetes() -> tuple[Tensor, Tensor]:
    """scikit-learn's diabetes regression, standardised: (442, 10) and (442, 1)."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None]
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


@functools.cache
def text() -> Tensor:
    """Tiny Shakespeare as character codes."""
    return torch.tensor(data.shakespeare())


def epochs(*tensors: Tensor, size: int, shuffle: bool = True) -> Batches:
    """Batches of `size`, in a new order every epoch, for ever; the last short batch of an epoch is left out."""
    count = len(tensors[0])
    while True:
        order = torch.randperm(count) if shuffle else torch.arange(count)
        for start in range(0, count - size + 1, size):
            chosen = order[start : start + size]
            yield tuple(tensor[chosen] for tensor in tensors)


def passages(size: int, length: int) -> Batches:
    """Characters and the characters that follow them, (size, length) each."""
    codes = text()
    while True:
        starts = torch.randint(len(codes) - length - 1, (size,)).tolist()
        window = torch.stack([codes[start : start + length + 1] for start in starts])
        yield window[:, :-1], window[:, 1:]


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    """Linear layers of these widths with the activation between them."""
    modules: list[nn.Module] = []
    for size, width in itertools.pairwise(widths[:-1]):
        modules.append(nn.Linear(size, width))
        if norm:
            modules.append(nn.LayerNorm(width))
        modules.append(activation())
    return nn.Sequential(*modules, nn.Linear(widths[-2], widths[-1]))


def set_gain(model: nn.Module, gain: float, bias: float = 0.0) -> nn.Module:
    """Every weight matrix N(0, gain / fan_in), every bias N(0, bias)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0, math.sqrt(gain / fan_in))
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, bias) if bias else nn.init.zeros_(module.bias)
    return model


def cnn(channels: int = 8, *, norm: bool = False) -> nn.Sequential:
    """Two convolutions and a linear layer for 28 x 28 pictures."""

    def block(size: int, width: int) -> list[nn.Module]:
        extra: list[nn.Module] = [nn.BatchNorm2d(width)] if norm else []
        return [nn.Conv2d(size, width, 3, padding=1), *extra, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, channels), *block(channels, 2 * channels), nn.Flatten(), nn.Linear(98 * channels, 10)
    )


def transformer(layers: int = 2, width: int = 48, *, context: int = 32, std: float = 0.02) -> CharacterModel:
    """A character model that trains at some 100 steps a second."""
    return CharacterModel(int(text().max()) + 1, width=width, heads=4, layers=layers, context=context, std=std)


def flat_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over all places of all sequences."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def warmup_cosine(peak: float, *, warmup: int, steps: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to a tenth."""

    def rate(k: int) -> float:
        if k < warmup:
            return peak * (k + 1) / warmup
        progress = min(1.0, (k - warmup) / max(1, steps - warmup))
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    return rate


class Recurrent(nn.Module):
    """An LSTM, GRU or plain RNN over a sequence, and a linear layer on its last state."""

    def __init__(self, kind: type[nn.Module], size: int, hidden: int, outputs: int, **options: object) -> None:
        super().__init__()
        self.cell = kind(size, hidden, batch_first=True, **options)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.cell(x)[0]
        logits: Tensor = self.head(states[:, -1])
        return logits


class Residual(nn.Module):
    """x + scale * f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out
