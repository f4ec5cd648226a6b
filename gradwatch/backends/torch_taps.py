"""Taps on the torch functions that change gradients between backward and step, in place while someone watches.

Clipping is seen through the module global that `clip_grad_norm_` itself calls, so that it is also seen in code that
imported `clip_grad_norm_` before; `GradScaler` through its class. The last listener to leave restores the originals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from gradwatch.errors import MissingDependencyError


class GradientListener(Protocol):
    """Who wants to know that gradients are about to be changed, or were."""

    def before_clip(self, parameters: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> None:
        """Gradients are about to be scaled to `max_norm`."""

    def after_change(self) -> None:
        """The change announced before is done."""

    def before_unscale(self, optimizer: Optimizer, scale: Tensor) -> None:
        """A `GradScaler` is about to divide the gradients of an optimizer."""

    def before_scaler_step(self, optimizer: Optimizer) -> None:
        """A `GradScaler` is about to step or not."""

    def after_scaler_step(self, optimizer: Optimizer, scale: Tensor) -> None:
        """It has decided."""

    def failed(self, error: Exception) -> None:
        """Telling failed; the training must not."""


_REPEATABLE = (list, tuple, Tensor)
_listeners: list[GradientListener] = []
_originals: list[tuple[Any, str, Any]] = []


def require_torch() -> None:
    """Say so where PyTorch is older than what the taps hold on to.

    Raises:
        MissingDependencyError: It is older than 2.6.
    """
    if not hasattr(clip_grad, "_clip_grads_with_norm_"):
        raise MissingDependencyError(f"gradwatch needs PyTorch 2.6 or newer: {torch.__version__}")


def listen(listener: GradientListener) -> None:
    """Add a listener; the first one puts the taps in place."""
    if not _listeners:
        _install()
    _listeners.append(listener)


def leave(listener: GradientListener) -> None:
    """Remove a listener; the last one removes the taps."""
    if listener in _listeners:
        _listeners.remove(listener)
    while _originals and not _listeners:
        owner, name, original = _originals[-1]
        setattr(owner, name, original)
        _originals.pop()


def _install() -> None:
    clip = clip_grad._clip_grads_with_norm_
    _replace(clip_grad, "_clip_grads_with_norm_", _clip_tap)
    if getattr(torch.nn.utils, "clip_grads_with_norm_", None) is clip:
        _replace(torch.nn.utils, "clip_grads_with_norm_", _clip_tap)
    _replace(torch.amp.GradScaler, "unscale_", _unscale_tap)
    _replace(torch.amp.GradScaler, "step", _scaler_step_tap)


def _replace(owner: Any, name: str, tap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    _originals.append((owner, name, original))
    setattr(owner, name, functools.wraps(original)(tap(original)))


def _failed(error: Exception) -> None:
    try:
        for listener in tuple(_listeners):
            listener.failed(error)
    except Exception:  # noqa: BLE001 -- there is nobody left to tell
        return


def _clip_tap(original: Callable[..., Any]) -> Callable[..., Any]:
    def clip_grads_with_norm_(
        parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None = None
    ) -> Any:
        # Only what can be gone through once is copied, for that can fail.
        held: Any = parameters if isinstance(parameters, _REPEATABLE) else list(parameters)
        try:
            for listener in tuple(_listeners):
                listener.before_clip([held] if isinstance(held, Tensor) else held, max_norm, total_norm)
        except Exception as error:  # noqa: BLE001 -- nothing of ours may break the clipping
            _failed(error)
        result = original(held, max_norm, total_norm, foreach)
        try:
            for listener in tuple(_listeners):
                listener.after_change()
        except Exception as error:  # noqa: BLE001 -- as above
            _failed(error)
        return result

    return clip_grads_with_norm_


def _unscale_tap(original: Callable[..., Any]) -> Callable[..., Any]:
    def unscale_(self: Any, optimizer: Optimizer) -> Any:
        try:
            scale = self._scale if self.is_enabled() else None
            if scale is not None:
                for listener in tuple(_listeners):
                    listener.before_unscale(optimizer, scale)
        except Exception as error:  # noqa: BLE001 -- nothing of ours may break the step
            _failed(error)
        result = original(self, optimizer)
        try:
            for listener in tuple(_listeners):
                listener.after_change()
        except Exception as error:  # noqa: BLE001 -- as above
            _failed(error)
        return result

    return unscale_


def _scaler_step_tap(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            listeners = tuple(_listeners) if self.is_enabled() else ()
            for listener in listeners:
                listener.before_scaler_step(optimizer)
        except Exception as error:  # noqa: BLE001 -- nothing of ours may break the step
            listeners = ()
            _failed(error)
        result = original(self, optimizer, *args, **kwargs)
        try:
            for listener in listeners:
                listener.after_scaler_step(optimizer, self._scale)
        except Exception as error:  # noqa: BLE001 -- as above
            _failed(error)
        return result

    return step
