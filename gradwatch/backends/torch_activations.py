"""Outputs of activation modules, sampled by hooks that sit on the model only while a step is sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradwatch.backends.torch_hooks import Handle, put
from gradwatch.backends.torch_model import clean_name, is_compiled
from gradwatch.errors import ModelError
from gradwatch.records import MODULE_STATISTICS, NOT_MEASURED

#: Outputs beyond which a bounded activation is flat: its derivative is below 1 % of the largest.
SATURATION = {
    "Sigmoid": (0.0025, 0.9975),
    "Tanh": (-0.995, 0.995),
    "Hardtanh": (-0.995, 0.995),
    "Softsign": (-0.9, 0.9),
}
RELU_FAMILY = ("ReLU", "ReLU6")
ACTIVATIONS = (*SATURATION, *RELU_FAMILY, "LeakyReLU", "PReLU", "GELU", "ELU", "SELU", "SiLU")


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name to module of the activations of a model; one that is used in several places once.

    Raises:
        ModelError: The model is compiled: hooks would have it compiled anew.
    """
    if is_compiled(model):
        raise ModelError("'activations' must be False for a compiled model: the hooks would make torch compile it anew")
    return {clean_name(name): module for name, module in model.named_modules() if type(module).__name__ in ACTIVATIONS}


@torch.no_grad()
def output_statistics(output: Tensor, kind: str) -> Tensor:
    """Mean, standard deviation, saturated share and dead share of an output, NaN where the kind has none.

    Args:
        output: Shape (batch, units) or (batch, channels, ...).
        kind: Type of the activation.

    Returns:
        float32, shape (4,), on the output's device. A unit is dead when it is zero for the whole batch; the units of an
        image are its channels.
    """
    values = output.detach().float()
    saturated = dead = torch.full((), torch.nan, device=values.device)
    if kind in SATURATION:
        low, high = SATURATION[kind]
        saturated = ((values <= low) | (values >= high)).float().mean()
    elif kind in RELU_FAMILY and values.dim() > 1:
        others = [axis for axis in range(values.dim()) if axis != (1 if values.dim() > 3 else values.dim() - 1)]
        dead = (values <= 0).all(dim=1).float().mean() if not others else (values.amax(dim=others) <= 0).float().mean()
    return torch.stack([values.mean(), values.std(correction=0), saturated, dead])


class ActivationSampler:
    """Measures the outputs of activation modules in the steps that are sampled.

    Args:
        modules: Name to module, as from `activation_modules`.
        guard: Calls a function with its arguments and keeps what it raises out of the forward and backward pass.
    """

    def __init__(self, modules: dict[str, nn.Module], guard: Callable[..., Any] = lambda f, *args: f(*args)) -> None:
        self._modules, self._guard = modules, guard
        self._handles: list[Handle] = []
        self._outputs: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}

    def arm(self) -> None:
        """Put the hooks on the modules, for the next forward pass."""
        if not self._handles:
            for place, module in enumerate(self._modules.values()):
                hook = self._hook(place, type(module).__name__)
                put(self._handles, module, "_forward_hooks", module.register_forward_hook, hook)

    def disarm(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def turn(self, *, is_sampled: bool, is_next_sampled: bool, is_last: bool) -> Any:
        """An optimizer has stepped: what was measured for its step, and hooks as the next step needs them.

        Args:
            is_sampled: The step is sampled.
            is_next_sampled: So is the next one.
            is_last: No other optimizer steps in this step.

        Returns:
            As `take`, a numpy array where it is on the host; None when there is nothing.
        """
        if is_next_sampled:
            self.arm()
        elif is_last:
            self.disarm()
        measured = self.take() if is_sampled else None
        return measured.numpy() if measured is not None and measured.device.type == "cpu" else measured

    def take(self) -> Tensor | None:
        """What was measured since the last call: five statistics by module, shape (m, 5), NaN where nothing was."""
        if not self._outputs:
            return None
        device = next(iter(self._outputs.values())).device
        nothing = torch.full((4,), torch.nan, device=device)
        rows = [
            torch.cat(
                [
                    self._outputs.get(place, nothing).to(device, non_blocking=True),
                    self._gradients.get(place, nothing[:1]).view(1).to(device, non_blocking=True),
                ]
            )
            for place in range(len(self._modules))
        ]
        self._outputs, self._gradients = {}, {}
        return torch.stack(rows)

    def _hook(self, place: int, kind: str) -> Callable[..., None]:
        def measure(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and torch.is_grad_enabled() and output.numel():
                self._outputs[place] = output_statistics(output, kind)
                if output.requires_grad:
                    output.register_hook(partial(self._guard, partial(self._note, place)))

        return partial(self._guard, measure)

    def _note(self, place: int, gradient: Tensor) -> None:
        self._gradients[place] = torch.linalg.vector_norm(gradient.detach().float())


def by_statistic(values: Any, modules: int) -> dict[str, npt.NDArray[np.float32]]:
    """What `ActivationSampler.take` gave, as arrays of shape (m,) by name of the statistic."""
    table = np.reshape(np.asarray(values, np.float32), (modules, len(MODULE_STATISTICS)))
    table = np.where(np.isnan(table), np.float32(NOT_MEASURED), table)
    return {name: table[:, column] for column, name in enumerate(MODULE_STATISTICS)}
