"""skorch: `NeuralNet(..., callbacks=[GradWatch(run_dir="runs/skorch")])`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, Unpack, cast

from torch import nn

from gradwatch.errors import MissingDependencyError
from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.settings import Options, WatchOptions

try:
    from skorch import NeuralNet
    from skorch.callbacks import Callback
except ImportError:
    raise MissingDependencyError.of("skorch", extra="skorch") from None


class GradWatch(Callback):  # type: ignore[misc]  # skorch has no types
    """Watches a skorch `NeuralNet` while it is fitted.

    Norms are taken before `GradientNormClipping` and its kin. `fit` makes a new run, `partial_fit` goes on with the one
    before. `Stop` ends the fit as `EarlyStopping` does. The validation loss of an epoch stands at its last step.

    Args:
        settings: What `gradwatch.watch` takes. In a grid search leave out `run_dir`: each fit needs one of its own.

    Examples:
        >>> callback = GradWatch(run_dir="runs/skorch", stats_every=50)
        >>> callback.watcher is None  # until the fit starts
        True
    """

    def __init__(self, **settings: Unpack[WatchOptions]) -> None:
        self.watcher: TorchWatcher | None = None
        self._settings = settings
        self._before: Options = {}
        self._state: Mapping[str, Any] | None = None
        self._stops = False

    def initialize(self) -> Self:
        """The net begins anew, and so does the record."""
        self._close("crashed", "fit() ended early")
        self._before, self._state = {}, None
        return self

    def on_train_begin(self, net: NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:  # noqa: N803
        """Start to watch, or go on."""
        self._close("crashed", "fit() ended early")
        optimizers = [getattr(net, f"{name}_") for name in net._optimizers]  # noqa: SLF001 -- the only list there is
        self._stops = False
        settings: WatchOptions = {**self._settings, **self._before}
        self.watcher = watch_torch(_trained(net), optimizers, **settings)
        self.watcher.on_stop = self._stop
        if self._state is not None:
            self.watcher.load_state_dict(self._state)

    def on_batch_end(self, net: NeuralNet, batch: Any = None, training: bool | None = None, **kwargs: Any) -> None:
        """Log the loss of the step; stop when asked to."""
        if not training or self.watcher is None:
            return
        self.watcher.log(loss=kwargs["loss"], epoch=len(net.history))
        if self._stops:
            raise KeyboardInterrupt  # what skorch's own callbacks end a fit with

    def on_epoch_end(self, net: NeuralNet, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any) -> None:
        """Log the validation loss."""
        if self.watcher is not None and (loss := net.history[-1].get("valid_loss")) is not None:
            self.watcher.log(valid_loss=loss)

    def on_train_end(self, net: NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:  # noqa: N803
        """Close the record."""
        self._close()

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings, so that scikit-learn can clone the callback."""
        return dict(self._settings)

    def set_params(self, **params: Any) -> Self:
        """Change settings of the next fit."""
        self._settings = cast("WatchOptions", {**self._settings, **params})
        return self

    def _stop(self, _: str) -> None:
        self._stops = True

    def _close(self, status: str = "finished", detail: str = "") -> None:
        watcher, self.watcher = self.watcher, None
        if watcher is not None and not watcher.is_closed:
            self._before, self._state = {"run_dir": watcher.run_dir, "resume": True}, watcher.state_dict()
            watcher.close(status, detail)


def _trained(net: NeuralNet) -> nn.Module:
    """The net's modules, joined under their names where there are several."""
    modules = {name: getattr(net, f"{name}_") for name in net._modules}  # noqa: SLF001 -- as above
    return next(iter(modules.values())) if len(modules) == 1 else nn.ModuleDict(modules)
