"""fastai: `Learner(..., cbs=GradWatch(run_dir="runs/fastai"))`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

from torch.optim import Optimizer

from gradwatch.actions.policy import Policy
from gradwatch.errors import ConfigurationError, MissingDependencyError
from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.settings import Options, settings_from

try:
    from fastai.callback.core import Callback, CancelFitException
    from fastai.optimizer import OptimWrapper
except ImportError:
    raise MissingDependencyError.of("fastai", extra="fastai") from None

#: What needs no more of an optimizer than its steps and its rate.
_WITHOUT_STATE = ("DecayLR", "RaiseLR", "Stop")


class GradWatch(Callback):  # type: ignore[misc]  # fastai has no types
    """Watches a fastai `Learner`.

    Norms are taken before `GradientClip`. A second fit of the same learner, as in `fine_tune`, goes on with the run;
    `lr_find` is left alone. `Stop` raises `CancelFitException`. fastai's own optimizers are supported; actions that
    change weights need one of torch, in an `OptimWrapper`.

    Args:
        settings: What `gradwatch.watch` takes.

    Examples:
        >>> callback = GradWatch(run_dir="runs/fastai", stats_every=50)  # doctest: +SKIP
    """

    run_valid = False

    def __init__(self, **settings: Unpack[Options]) -> None:
        super().__init__()
        self.watcher: TorchWatcher | None = None
        self._settings = settings
        self._before: dict[str, Any] = {}
        self._state: Mapping[str, Any] | None = None
        self._stops = False
        self._release: Callable[[], None] = _nothing

    def before_fit(self) -> None:
        """Start to watch, or go on."""
        self._close("crashed", "fit() ended early")
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self.learn, "gather_preds")
        if not self.run:
            return
        optimizer = self.learn.opt
        if isinstance(optimizer, OptimWrapper):
            watched = optimizer.opt
        else:
            _require_no_state(self._settings)
            watched = Stepper(optimizer)
            optimizer.step = watched.step_as_it_is
            self._release = watched.let_go
        self._stops = False
        self.watcher = watch_torch(self.learn.model, watched, **{**self._settings, **self._before})
        self.watcher.on_stop = self._stop
        if self._state is not None:
            self.watcher.load_state_dict(self._state)

    def after_batch(self) -> None:
        """Log the loss of the step; stop when asked to."""
        if self.watcher is not None:
            self.watcher.log(loss=self.learn.loss.detach(), epoch=self.learn.epoch)
            if self._stops:
                raise CancelFitException

    def after_fit(self) -> None:
        """Close the record."""
        self._close()

    def _stop(self, _: str) -> None:
        self._stops = True

    def _close(self, status: str = "finished", detail: str = "") -> None:
        release, self._release = self._release, _nothing
        release()
        watcher, self.watcher = self.watcher, None
        if watcher is not None and not watcher.is_closed:
            self._before, self._state = {"run_dir": watcher.run_dir, "resume": True}, watcher.state_dict()
            watcher.close(status, detail)


class Stepper(Optimizer):
    """An optimizer of fastai as one of torch: with hooks around its steps, and a rate that can be scaled for one.

    Args:
        inner: The optimizer of fastai.
    """

    def __init__(self, inner: Any) -> None:
        self._inner, self._step = inner, inner.step
        super().__init__([{"params": list(each)} for each in inner.param_lists], {})
        self._read_rates()

    def step_as_it_is(self) -> None:
        """What `inner.step` is while it is watched."""
        self._read_rates()
        self.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # never returns a loss
        """One step, with the rates of the groups."""
        rates = [hyper["lr"] for hyper in self._inner.hypers]
        try:
            for hyper, group in zip(self._inner.hypers, self.param_groups, strict=True):
                hyper["lr"] = group["lr"]
            self._step()
        finally:
            for hyper, rate in zip(self._inner.hypers, rates, strict=True):
                hyper["lr"] = rate

    def let_go(self) -> None:
        """Make the optimizer what it was."""
        del self._inner.step

    def _read_rates(self) -> None:
        for hyper, group in zip(self._inner.hypers, self.param_groups, strict=True):
            group["lr"] = hyper["lr"]


def _require_no_state(settings: Options) -> None:
    for action in Policy(settings_from(settings).actions).between:
        if action.name not in _WITHOUT_STATE:
            raise ConfigurationError(
                f"'actions': {action.name} needs an optimizer of torch, in an OptimWrapper: {action!r}"
            )


def _nothing() -> None:
    """There is nothing to let go of."""
