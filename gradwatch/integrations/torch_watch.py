"""`gradwatch.watch` for PyTorch: one process or one of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack, cast

from torch import nn
from torch.optim import Optimizer

from gradwatch.backends.torch_restart import how_it_ended, last_words, restarts
from gradwatch.backends.torch_sharding import world
from gradwatch.backends.torch_taps import require_torch
from gradwatch.errors import GradwatchError, ModelError
from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_attach import unwrapped
from gradwatch.integrations.torch_distributed import RANK_SETTINGS, RankWatcher
from gradwatch.reader import RunReader
from gradwatch.records import RunInfo
from gradwatch.settings import TorchOptions, WatchOptions


def watch_torch(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None, **settings: Unpack[WatchOptions]
) -> TorchWatcher:
    """See `gradwatch.watch`."""
    require_torch()
    given = [] if optimizer is None else optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [unwrapped(each) for each in given]
    loss_fn = settings.get("loss_fn")
    if loss_fn is not None and not isinstance(loss_fn, nn.Module):
        raise ModelError(f"'loss_fn' must be a torch.nn.Module: {loss_fn!r}")
    rank, count = world()
    before = _resumed(settings) if rank == 0 else None
    watcher = RankWatcher(model, optimizers, **settings) if count > 1 else _alone(model, optimizers, settings)
    if before is not None:
        _mark_restart(watcher, before, count)
    return watcher


def _alone(model: nn.Module, optimizers: Sequence[Optimizer], settings: WatchOptions) -> TorchWatcher:
    alone = cast("TorchOptions", {k: v for k, v in settings.items() if k not in RANK_SETTINGS})
    return TorchWatcher(model, optimizers, **alone)


def _resumed(settings: WatchOptions) -> RunInfo | None:
    """The run that is resumed, if one is."""
    try:
        return RunReader(settings.get("run_dir") or "").info if settings.get("resume", False) is not False else None
    except GradwatchError:
        return None


def _mark_restart(watcher: TorchWatcher, before: RunInfo, count: int) -> None:
    """Note in the record what a resumed run has behind it."""
    size = before.world_size
    if number := restarts():
        ended = how_it_ended(last_words(str(watcher.settings.run_dir), size), size) or before.status_detail
        watcher.mark(f"restart {number} by torchrun" + (f"; before it: {ended}" if ended else ""))
    if size != count:
        watcher.mark(f"resumed with {count} ranks; there were {size} before")
