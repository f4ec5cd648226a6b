"""What the ranks learn together, and one process alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 6
#: The tensor-parallel rows of the output: torch wants at least one on every rank.
OUT = 4
BATCH = 8


def network() -> nn.Sequential:
    """The same on every rank; sizes that do not divide evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, OUT))


def batch(step: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The batch of all ranks together."""
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(BATCH, WIDTH, generator=generator), torch.randn(BATCH, OUT, generator=generator)
    return x * scale, y * scale


def transformer_like() -> nn.Sequential:
    """What sequence parallelism is for: a norm in front of two layers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, OUT))


def sequences(step: int) -> tuple[Tensor, Tensor]:
    """A batch of sequences of eight positions."""
    generator = torch.Generator().manual_seed(200 + step)
    return torch.randn(4, 8, WIDTH, generator=generator), torch.randn(4, 8, OUT, generator=generator)
