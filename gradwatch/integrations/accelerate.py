"""Accelerate: `watcher = watch(accelerator, model, optimizer, run_dir="runs/acc")` after `accelerator.prepare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_watch import watch_torch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


def watch(accelerator: Accelerator, model: nn.Module, optimizer: Any, **settings: Any) -> TorchWatcher | None:
    """Watch what `accelerator.prepare` returned.

    Norms are those before `accelerator.clip_grad_norm_`; one row is one step of the optimizer, however many batches are
    accumulated.

    Args:
        accelerator: Tells the main process.
        model: The prepared model.
        optimizer: The prepared optimizer, or several.
        settings: What `gradwatch.watch` takes.

    Returns:
        The watcher on the main process, None on the others.
    """
    if not accelerator.is_main_process:
        return None
    return watch_torch(accelerator.unwrap_model(model), optimizer, **settings)
