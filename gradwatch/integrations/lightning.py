"""Lightning: `Trainer(callbacks=[GradWatch(run_dir="runs/lit")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from gradwatch.errors import MissingDependencyError
from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.settings import WatchOptions

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]  # the older name of the same package
    except ImportError:
        raise MissingDependencyError.of("lightning", extra="lightning") from None


class GradWatch(pl.Callback):
    """Watches the training of a `LightningModule`.

    Norms are taken at the end of backward, unscaled and before Lightning clips; accumulation, manual optimization and
    several optimizers need nothing more. The loss is that of `training_step`. `Stop` ends the fit through
    `Trainer.should_stop`. Every rank is watched; rank 0 records.

    Args:
        settings: What `gradwatch.watch` takes; `run_dir` is by default `gradwatch` in the trainer's root directory.

    Examples:
        >>> callback = GradWatch(run_dir="runs/lit", stats_every=50)
        >>> callback.watcher is None  # until the fit starts
        True
    """

    def __init__(self, **settings: Unpack[WatchOptions]) -> None:
        self.watcher: TorchWatcher | None = None
        self._settings = settings
        self._state: dict[str, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to watch."""
        settings: WatchOptions = {"run_dir": Path(trainer.default_root_dir) / "gradwatch", **self._settings}
        model = trainer.strategy.model or pl_module  # as it is wrapped
        self.watcher = watch_torch(model, list(trainer.optimizers), **settings)
        self.watcher.on_stop = lambda _: setattr(trainer, "should_stop", True)
        if self._state:
            self.watcher.load_state_dict(self._state)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the loss, which Lightning has divided by the number of accumulated batches."""
        if self.watcher is not None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if loss is not None:
                self.watcher.log(loss=loss.detach() * trainer.accumulate_grad_batches, epoch=trainer.current_epoch)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the record with the reason."""
        if self.watcher is not None:
            self.watcher.close("crashed", f"{type(exception).__name__}: {exception}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the record."""
        if self.watcher is not None:
            self._state = self.watcher.state_dict()
            self.watcher.close()

    def state_dict(self) -> dict[str, Any]:
        """Baselines and actions, for Lightning's checkpoints."""
        return self.watcher.state_dict() if self.watcher is not None and not self.watcher.is_closed else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._state = state_dict
