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
from gradwatch.errors import ModelError

if TYPE_CHECKING:
    from gradwatch.integrations.torch import TorchWatcher


def attach(watcher: TorchWatcher, optimizers: Sequence[Optimizer], loss_fn: nn.Module | None) -> Callable[[], None]:
    """Let a watcher hear of optimizer steps, clips and losses; returns what ends that.

    Args:
        watcher: Held by the hooks of the optimizers given, so that it lives as long as they do.
        optimizers: Empty for every optimizer of the process; such hooks hold the watcher weakly.
        loss_fn: A module whose output is the loss; None for none.
    """
    handles: list[Any] = []
    before, after = (
        _untraced(watcher.safely.hook(watcher.before_step)),
        _untraced(watcher.safely.hook(watcher.after_step)),
    )
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(before))
        handles.append(optimizer.register_step_post_hook(after))
    reference = weakref.ref(watcher)
    if not optimizers:
        handles.append(register_optimizer_step_pre_hook(_untraced(_weakly(reference, "before_step"))))
        handles.append(register_optimizer_step_post_hook(_untraced(_weakly(reference, "after_step"))))
    if loss_fn is not None:
        handles.append(loss_fn.register_forward_hook(LossHook(reference)))
    ear = Ear(reference)
    torch_taps.listen(ear)
    # Of a watcher that is dropped without `close`, nothing stays in the process either.
    finalizer = weakref.finalize(watcher, _let_go, handles, ear)
    finalizer.atexit = False
    return finalizer


def _let_go(handles: Sequence[Any], ear: Ear) -> None:
    for handle in handles:
        handle.remove()
    torch_taps.leave(ear)


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, run as it is where the step of the optimizer itself is compiled."""
    # Torch imports its compiler with the first optimizer; before that an import would cost a second.
    outside: Any = torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else None

    def call(*args: Any) -> Any:
        return outside(*args) if outside is not None and torch.compiler.is_compiling() else hook(*args)

    return call


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

    def before_clip(self, parameters: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
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


class LossHook:
    """Logs the output of a loss module; inert in copies and pickles of it, and inside compiled code.

    Args:
        watcher: A weak reference; None makes the hook inert.
    """

    def __init__(self, watcher: weakref.ref[TorchWatcher] | None = None) -> None:
        self._watcher = watcher

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._watcher is None:
            return
        watcher = self._watcher()
        if watcher and isinstance(output, Tensor) and output.numel() == 1 and module.training and output.requires_grad:
            watcher.faults.call("loss hook", watcher.log, loss=output, default=None)

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
