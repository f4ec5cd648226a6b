"""`gradwatch.watch` for PyTorch: one process or one of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradwatch.backends.torch_sharding import world
from gradwatch.errors import ModelError
from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_attach import unwrapped
from gradwatch.integrations.torch_distributed import RANK_SETTINGS, RankWatcher


def watch_torch(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None, **settings: Any
) -> TorchWatcher:
    """See `gradwatch.watch`."""
    given = [] if optimizer is None else optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [unwrapped(each) for each in given]
    loss_fn = settings.get("loss_fn")
    if loss_fn is not None and not isinstance(loss_fn, nn.Module):
        raise ModelError(f"'loss_fn' must be a torch.nn.Module: {loss_fn!r}")
    _, count = world()
    if count > 1:
        return RankWatcher(model, optimizers, **settings)
    for name in RANK_SETTINGS:
        settings.pop(name, None)
    return TorchWatcher(model, optimizers, **settings)
