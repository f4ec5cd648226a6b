"""Applies decisions to a torch optimizer: scales and clips gradients, skips a step, scales the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.backends.torch_sharding import is_partial, local


@torch.no_grad()
def scale_gradients(parameters: Sequence[nn.Parameter], scale: Any) -> None:
    """Multiply gradients in place by one factor, or each by its own.

    On the host, gradients with factor 1 are not touched; factors on a device are never looked at.

    Args:
        parameters: Whose gradients; those without are passed over.
        scale: A number, a scalar tensor, or numbers of shape (number of parameters,).
    """
    is_one = np.ndim(scale) == 0
    if is_one and not isinstance(scale, Tensor) and float(scale) == 1.0:
        return
    grads = local([parameter.grad for parameter in parameters])
    if is_one:
        _multiply([grad for grad in grads if grad is not None], scale)
        return
    factors = scale.unbind() if isinstance(scale, Tensor) else [float(factor) for factor in scale]
    touched = [
        (grad, factor)
        for grad, factor in zip(grads, factors, strict=True)
        if grad is not None and (isinstance(factor, Tensor) or factor != 1.0)
    ]
    if touched:
        _multiply_each([grad for grad, _ in touched], [factor for _, factor in touched])


def _multiply(grads: list[Tensor], factor: Any) -> None:
    if not grads:
        return
    if isinstance(factor, Tensor):
        for device in {grad.device for grad in grads}:
            there = factor.to(device, non_blocking=True)
            _foreach_multiply([grad for grad in grads if grad.device == device], there)
    else:
        _foreach_multiply(grads, float(factor))


def _foreach_multiply(grads: list[Tensor], factor: Any) -> None:
    if any(grad.layout is not torch.strided for grad in grads):
        for grad in grads:
            grad.mul_(factor)
    else:
        torch._foreach_mul_(grads, factor)


def _multiply_each(grads: list[Tensor], factors: list[Any]) -> None:
    if isinstance(factors[0], Tensor) or any(grad.layout is not torch.strided for grad in grads):
        for grad, factor in zip(grads, factors, strict=True):
            grad.mul_(factor.to(grad.device, non_blocking=True) if isinstance(factor, Tensor) else factor)
    else:
        torch._foreach_mul_(grads, factors)


@torch.no_grad()
def clip_values(parameters: Sequence[nn.Parameter], limit: Any) -> None:
    """Limit each element of the gradients to [-limit, limit], in place.

    Raises:
        NotImplementedError: A gradient is a sum over ranks, of which this rank has a term.
    """
    if any(is_partial(parameter.grad) for parameter in parameters):
        raise NotImplementedError("a gradient that is a sum over ranks (Partial) cannot be clipped by value")
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            # Duplicate entries add up: only the sum may be limited.
            parameter.grad = grad = grad.coalesce()
        (target,) = local([grad if grad.layout is torch.strided else grad.values()])
        if target.is_complex():
            target = torch.view_as_real(target)
        target.clamp_(-limit, limit)


class Skip:
    """Hides the gradients of an optimizer for one step: it passes over parameters without gradient.

    So parameters, momenta and step counters stay as they are, with every optimizer of torch, fused or not.

    Args:
        parameters: The parameters that the optimizer holds.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._hidden = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in self._hidden:
            parameter.grad = None

    def undo(self) -> None:
        """Give the gradients back."""
        for parameter, grad in self._hidden:
            if parameter.grad is None:
                parameter.grad = grad
        self._hidden = []


class SkipOnDevice:
    """Tells a fused optimizer to skip by a flag on the device, as `torch.amp.GradScaler` does: nobody waits for it.

    Args:
        optimizer: A fused one, whose kernel looks at `found_inf`.
        skip: Boolean scalar tensor.
    """

    def __init__(self, optimizer: Optimizer, skip: Tensor) -> None:
        self._optimizer = cast(Any, optimizer)
        self._before = getattr(optimizer, "found_inf", None)
        flag = skip.to(torch.float32)
        self._optimizer.found_inf = flag if self._before is None else torch.maximum(flag, self._before)

    def undo(self) -> None:
        """Take the flag away."""
        if self._before is None:
            del self._optimizer.found_inf
        else:
            self._optimizer.found_inf = self._before


class KeptCounters:
    """Puts back the plain numbers in the optimizer's state that count evaluations of a closure (those of LBFGS).

    Args:
        optimizer: Before its step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._state = optimizer.state
        self._saved = {key: dict(entry) for key, entry in optimizer.state.items() if isinstance(entry, dict)}

    def undo(self) -> None:
        """Make the state what it was, as far as it is not tensors that nobody touched."""
        for key in list(self._state):
            if key in self._saved:
                self._state[key].clear()
                self._state[key].update(self._saved[key])
            elif isinstance(self._state[key], dict):
                del self._state[key]


def skip_step(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], skip: Any, counters: KeptCounters | None
) -> list[Callable[[], None]]:
    """Make an optimizer leave out the step that it is about to take.

    Args:
        optimizer: A fused one can be told on the device; for others the host waits for a `skip` that is there.
        parameters: What it holds.
        skip: True, or a boolean scalar tensor.
        counters: The state before the step, where the step evaluates a closure.

    Returns:
        What to call after the step.
    """
    if isinstance(skip, Tensor):
        if all(group.get("fused") for group in optimizer.param_groups):
            return [SkipOnDevice(optimizer, skip).undo]
        if not bool(skip):
            return []
    undo = [Skip(parameters).undo]
    return [*undo, counters.undo] if counters is not None else undo


class ScaledLR:
    """Scales the learning rates of an optimizer for one step; no scheduler ever sees the factor.

    Args:
        optimizer: Its groups' `lr` may be numbers or tensors.
        factor: What to multiply by.
    """

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        self._saved = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
        for group, lr in self._saved:
            group["lr"] = lr * factor

    def undo(self) -> None:
        """Put the learning rates back exactly."""
        for group, lr in self._saved:
            group["lr"] = lr
        self._saved = []
