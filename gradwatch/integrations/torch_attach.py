"""Where a watcher listens: optimizer hooks, taps, the loss module. Nothing here keeps a model or a watcher alive."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradwatch.backends import torch_taps
from gradwatch.backends.torch_hooks import Handle, put
from gradwatch.errors import ModelError, StopTraining

if TYPE_CHECKING:
    from gradwatch.integrations.torch import TorchWatcher


def attach(watcher: TorchWatcher, optimizers: Sequence[Optimizer], loss_fn: nn.Module | None) -> Callable[[], None]:
    """Let a watcher hear of optimizer steps, clips and losses; returns what ends that.

    Args:
        watcher: Held by the hooks of the optimizers given, so that it lives as long as they do.
        optimizers: Empty for every optimizer of the process; such hooks hold the watcher weakly.
        loss_fn: A module whose output is the loss; None for none.
    """
    handles: list[Handle] = []
    reference = weakref.ref(watcher)
    ear = Ear(reference)
    # Of a watcher that is dropped without `close`, nothing stays in the process either.
    finalizer = weakref.finalize(watcher, _let_go, handles, ear)
    finalizer.atexit = False

    def detach() -> None:
        _let_go(handles, ear)
        finalizer.detach()

    try:
        _listen(watcher, optimizers, loss_fn, handles)
        torch_taps.listen(ear)
    except BaseException:
        detach()
        raise
    return detach


def _listen(
    watcher: TorchWatcher, optimizers: Sequence[Optimizer], loss_fn: nn.Module | None, handles: list[Handle]
) -> None:
    reference = weakref.ref(watcher)
    before, after = (
        _untraced(watcher.safely.hook(watcher.before_step), reference),
        _untraced(watcher.safely.hook(watcher.after_step), reference),
    )
    for optimizer in optimizers:
        put(handles, optimizer, "_optimizer_step_pre_hooks", optimizer.register_step_pre_hook, before)
        put(handles, optimizer, "_optimizer_step_post_hooks", optimizer.register_step_post_hook, after)
    if not optimizers:
        before, after = (_untraced(_weakly(reference, name), reference) for name in ("before_step", "after_step"))
        everyone = sys.modules[Optimizer.__module__]
        put(handles, everyone, "_global_optimizer_pre_hooks", register_optimizer_step_pre_hook, before)
        put(handles, everyone, "_global_optimizer_post_hooks", register_optimizer_step_post_hook, after)
    if loss_fn is not None:
        put(handles, loss_fn, "_forward_hooks", loss_fn.register_forward_hook, LossHook(reference))


def _let_go(handles: Sequence[Handle], ear: Ear) -> None:
    for handle in handles:
        handle.remove()
    torch_taps.leave(ear)


def _untraced(hook: Callable[..., Any], reference: weakref.ref[TorchWatcher]) -> Callable[..., Any]:
    """The hook, run as it is where the step of the optimizer itself is compiled."""
    # Torch imports its compiler with the first optimizer; before that an import would cost a second.
    outside: Any = torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else None

    def call(*args: Any) -> Any:
        try:
            return outside(*args) if outside is not None and torch.compiler.is_compiling() else hook(*args)
        except StopTraining:
            raise
        except Exception as error:  # noqa: BLE001 -- what failed on the way to the guard
            _tell(reference, error)
            return None

    return call


def _tell(reference: weakref.ref[TorchWatcher] | None, error: Exception) -> None:
    try:
        if reference is not None and (watcher := reference()) is not None:
            watcher.safely.failed(error)
    except Exception:  # noqa: BLE001 -- there is nobody left to tell
        return


def _weakly(reference: weakref.ref[TorchWatcher], name: str) -> Callable[..., Any]:
    def hook(*args: Any) -> Any:
        watcher = reference()
        return None if watcher is None else watcher.safely(getattr(watcher, name), *args)

    return hook


class Ear:
    """Hears the taps for one watcher.

    Args:
        watcher: A weak reference.
    """

    def __init__(self, watcher: weakref.ref[TorchWatcher]) -> None:
        self._watcher = watcher

    def before_clip(self, parameters: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> None:
        """Gradients are about to be scaled."""
        if watcher := self._watcher():
            watcher.safely(watcher.clipping, parameters, max_norm, total_norm)

    def before_unscale(self, optimizer: Optimizer, scale: Tensor) -> None:
        """Gradients are about to be divided by the loss scale."""
        if watcher := self._watcher():
            watcher.safely(watcher.unscaling, optimizer, scale)

    def after_change(self) -> None:
        """They were."""
        if watcher := self._watcher():
            watcher.safely(watcher.pending.after_change)

    def before_scaler_step(self, optimizer: Optimizer) -> None:
        """A GradScaler is about to step or to decide not to."""
        if watcher := self._watcher():
            watcher.has_stepped = False

    def after_scaler_step(self, optimizer: Optimizer, scale: Tensor) -> None:
        """It did; when no optimizer stepped, it found an overflow."""
        if watcher := self._watcher():
            watcher.safely(watcher.scaled, optimizer, scale)

    def failed(self, error: Exception) -> None:
        """One of the above failed before it came to the watcher."""
        _tell(self._watcher, error)


class LossHook:
    """Logs the output of a loss module; inert in copies and pickles of it, and inside compiled code.

    Args:
        watcher: A weak reference; None makes the hook inert.
    """

    def __init__(self, watcher: weakref.ref[TorchWatcher] | None = None) -> None:
        self._watcher = watcher

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        try:
            if torch.compiler.is_compiling() or self._watcher is None:
                return
            watcher = self._watcher()
            is_loss = isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad
            if watcher and is_loss and module.training:
                watcher.faults.call("loss hook", watcher.log, loss=output, default=None)
        except Exception as error:  # noqa: BLE001 -- nothing of ours may break the forward pass
            _tell(self._watcher, error)

    def __reduce__(self) -> tuple[type[LossHook], tuple[()]]:
        return LossHook, ()


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrappers of trainers, which only pass steps on.

    Raises:
        ModelError: Nothing of the kind.
    """
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ModelError(f"'optimizer' must be a torch.optim.Optimizer, a list of them, or None: {optimizer!r}")
    return optimizer
