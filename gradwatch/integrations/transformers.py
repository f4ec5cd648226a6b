"""Hugging Face Trainer: `Trainer(..., callbacks=[GradWatch(run_dir="runs/hf")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from gradwatch.errors import MissingDependencyError
from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.settings import Options, WatchOptions
from gradwatch.watcher import Watcher

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    raise MissingDependencyError.of("transformers", extra="transformers") from None


class GradWatch(TrainerCallback):
    """Watches a Hugging Face `Trainer`.

    Norms are taken before clipping, although the Trainer's own hook comes behind it. The loss of every step is the mean
    over its accumulated batches, read from the model's output; it is not filtered for NaN. The global norm is added to
    the Trainer's logs as `gradwatch/global_norm`. `Stop` sets `should_training_stop`. Every process is watched, the
    main one records.

    Args:
        settings: What `gradwatch.watch` takes; `run_dir` is by default `gradwatch` in the output directory.

    Examples:
        >>> callback = GradWatch(run_dir="runs/hf")
        >>> callback.watcher is None  # until the training starts
        True
    """

    def __init__(self, **settings: Unpack[WatchOptions]) -> None:
        self.watcher: Watcher | None = None
        self._settings = settings
        self._losses: list[Tensor] = []
        self._handle: Any = None
        self._stops = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to watch."""
        model: nn.Module = kwargs["model"]
        settings: WatchOptions = {"run_dir": Path(str(args.output_dir)) / "gradwatch", **self._settings}
        self.watcher = _watch_deepspeed(model, settings) if args.deepspeed else None
        self.watcher = self.watcher or watch_torch(model, kwargs["optimizer"], **settings)
        self.watcher.on_stop = self._stop
        self._handle = model.register_forward_hook(_LossReader(self._losses))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the loss of the step; stop when asked to."""
        if self.watcher is None:
            return
        numbers: dict[str, Any] = {"epoch": state.epoch or 0.0}
        if self._losses:
            numbers["loss"] = sum(self._losses[1:], self._losses[0]) / len(self._losses)
            self._losses.clear()
        self.watcher.log(**numbers)
        control.should_training_stop = control.should_training_stop or self._stops

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the last known global norm to what the Trainer logs."""
        if (
            self.watcher is not None
            and logs is not None
            and "loss" in logs
            and self.watcher.last_global_norm is not None
        ):
            for entry in (logs, *state.log_history[-1:]):
                entry["gradwatch/global_norm"] = self.watcher.last_global_norm

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the record."""
        if self._handle is not None:
            self._handle.remove()
        if self.watcher is not None:
            self.watcher.close()

    def _stop(self, _: str) -> None:
        self._stops = True


def _watch_deepspeed(model: nn.Module, settings: WatchOptions) -> Watcher | None:
    """Watch the engine of a model, which is none on a CPU although the arguments ask for one."""
    from gradwatch.backends.deepspeed_parts import engine_of
    from gradwatch.integrations.deepspeed import DeepSpeedWatcher

    engine = engine_of(model)
    shared: Options = settings
    return None if engine is None else DeepSpeedWatcher(engine, **shared)


class _LossReader:
    """A forward hook that keeps the loss of the model's output while it trains; inert in copies and pickles."""

    def __init__(self, losses: list[Tensor] | None = None) -> None:
        self._losses = losses

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._losses is not None and module.training:
            loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self._losses.append(loss.detach())

    def __reduce__(self) -> tuple[type[_LossReader], tuple[()]]:
        return _LossReader, ()
