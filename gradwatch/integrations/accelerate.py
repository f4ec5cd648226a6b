"""Accelerate: `watcher = watch(accelerator, model, optimizer, run_dir="runs/acc")` after `accelerator.prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.settings import Options, WatchOptions
from gradwatch.watcher import Watcher

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


def watch(accelerator: Accelerator, model: nn.Module, optimizer: Any, **settings: Unpack[WatchOptions]) -> Watcher:
    """Watch what `accelerator.prepare` returned; called in every process, at the same place.

    Norms are those before `accelerator.clip_grad_norm_`; one row is one step of the optimizer, however many batches are
    accumulated. The main process records.

    Args:
        accelerator: The one that prepared them.
        model: The prepared model, as it is wrapped.
        optimizer: The prepared optimizer, or several.
        settings: What `gradwatch.watch` takes; `run_dir` is by default `gradwatch` in the project's directory, if there
            is one.

    Returns:
        The watcher of this process.
    """
    if accelerator.project_dir is not None:
        settings.setdefault("run_dir", Path(accelerator.project_dir) / "gradwatch")
    if accelerator.distributed_type == "DEEPSPEED":
        from gradwatch.integrations.deepspeed import DeepSpeedWatcher

        shared: Options = settings
        return DeepSpeedWatcher(model, **shared)
    return watch_torch(model, optimizer, **settings)
