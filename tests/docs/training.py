"""What the pages call `model`, `optimizer`, `loader` and `loss_fn`."""

from __future__ import annotations

import torch
from torch import nn

Loader = list[tuple[torch.Tensor, torch.Tensor]]


def training(steps: int = 30) -> tuple[nn.Module, torch.optim.Optimizer, Loader, nn.Module]:
    """A small model that learns; every call makes a new one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(steps, 16, 8)
    loader = [(batch, batch[:, :4].argmax(dim=1)) for batch in x]
    return model, torch.optim.SGD(model.parameters(), lr=0.1), loader, nn.CrossEntropyLoss()
