"""PyTorch Ignite: `GradWatch(model, optimizer, run_dir="runs/ignite").attach(trainer)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from torch import nn

from gradwatch.errors import MissingDependencyError
from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.settings import WatchOptions

try:
    from ignite.engine import Engine, Events
except ImportError:
    raise MissingDependencyError.of("ignite", extra="ignite") from None


class GradWatch:
    """Watches a model that an Ignite engine trains.

    The loss is what the engine's process function returns, or the entry `loss` of it. `Stop` ends the run through
    `Engine.terminate`.

    Args:
        model: The model.
        optimizer: One optimizer, or a list.
        output_transform: From the engine's output to the loss.
        settings: What `gradwatch.watch` takes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        output_transform: Callable[[Any], Any] | None = None,
        **settings: Unpack[WatchOptions],
    ) -> None:
        self.watcher = watch_torch(model, optimizer, **settings)
        self._loss_of = output_transform or _loss_of

    def attach(self, engine: Engine) -> None:
        """Listen to the engine until its run is over."""
        self.watcher.on_stop = lambda _: engine.terminate()
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._log)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._crashed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, lambda _: self.watcher.close())

    def _log(self, engine: Engine) -> None:
        if not self.watcher.is_closed:
            loss = self._loss_of(engine.state.output)
            self.watcher.log(epoch=engine.state.epoch, **({} if loss is None else {"loss": loss}))

    def _crashed(self, engine: Engine, error: BaseException) -> None:
        self.watcher.close("crashed", f"{type(error).__name__}: {error}")
        raise error


def _loss_of(output: Any) -> Any:
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, (int, float)) or hasattr(loss, "detach") else None
