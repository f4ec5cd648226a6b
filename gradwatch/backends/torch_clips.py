"""What the user's loop multiplied the gradients by since they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwatch.backends.torch_device import beside, on_host
from gradwatch.backends.torch_gradients import Held

EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


class Clips:
    """Collects the factors of `clip_grad_norm_` and its kin between backward and step."""

    def __init__(self) -> None:
        self._factors: list[tuple[list[int] | None, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._factors)

    def clear(self) -> None:
        """Forget all: the gradients are measured anew."""
        self._factors.clear()

    def add(self, places: list[int] | None, max_norm: float, total_norm: Tensor) -> None:
        """Note one clip of the parameters at these places; None for all."""
        if on_host(total_norm):
            # An infinite norm gives the factor 0, a NaN one NaN, as torch multiplies.
            self._factors.append((places, min(max_norm / (float(total_norm) + EPSILON), 1.0)))
        else:
            self._factors.append((places, torch.clamp(max_norm / (total_norm.float() + EPSILON), max=1.0)))

    def part(self, held: Held) -> Any:
        """The factor for all parameters of an optimizer, or one for each, shape (number of parameters,)."""
        if all(places is None for places, _ in self._factors):
            product: Any = 1.0
            for _, factor in self._factors:
                product = beside(product, factor) * factor
            return product
        on_device = next((factor.device for _, factor in self._factors if isinstance(factor, Tensor)), None)
        factors: Any = np.ones(len(held.places), np.float32)
        if on_device is not None:
            factors = torch.ones(len(held.places), device=on_device)
        for places, factor in self._factors:
            there = beside(factor, factors)
            factors = factors * there if places is None else _multiplied(factors, held, places, there)
        return factors


def _multiplied(factors: Any, held: Held, places: Sequence[int], factor: Any) -> Any:
    chosen = set(places)
    mask = [place in chosen for place in held.places]
    if isinstance(factors, Tensor):
        kept = torch.tensor(mask, pin_memory=factors.device.type == "cuda").to(factors.device, non_blocking=True)
        return torch.where(kept, factors * factor, factors)
    return np.where(np.array(mask), factors * np.float32(factor), factors)
