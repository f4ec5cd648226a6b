"""Statistics that are sampled every few steps: weights, updates, extremes, zeros and non-finite elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradwatch.backends.torch_device import DeviceNorms, on_host
from gradwatch.backends.torch_norms import CpuNorms, flat, is_float8
from gradwatch.backends.torch_sharding import local
from gradwatch.backends.torch_slab import is_small, slabs
from gradwatch.records import NOT_MEASURED, Floats

#: Up to so many weights the memory for the copy is kept: fresh memory costs more than the copying.
_MOST_KEPT = 1 << 22
#: Weights copied at once to measure an update; a larger model is measured part by part, one part a sample.
MOST_COPIED = 1 << 26

GRADIENT_STATISTICS = ("grad_max", "zero_fraction", "nonfinite_count")


class CpuExtremes:
    """Largest finite magnitude, share of exact zeros and number of non-finite elements of CPU tensors; planned once.

    Args:
        tensors: Examples of the tensors to come: same number, shapes, layouts and types.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        small = [place for place, tensor in enumerate(tensors) if is_small(tensor)]
        self._slabs = slabs(tensors, small)
        self._others = sorted(set(range(len(tensors))) - set(small))

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Shape (3, number of tensors), in the order of `GRADIENT_STATISTICS`; `NOT_MEASURED` of empty tensors."""
        found = np.full((3, len(tensors)), NOT_MEASURED, np.float32)
        for slab in self._slabs:
            lines = slab.fill(tensors)
            largest = np.maximum.reduceat(torch.maximum(lines.amax(1), -lines.amin(1)).numpy(), slab.starts)
            filled = np.add.reduceat(lines.bool().sum(1).numpy(), slab.starts)
            found[:, slab.places] = largest, 1.0 - filled / slab.sizes, np.zeros(len(slab.places))
        for place in self._others:
            line = flat(tensors[place])
            if line.numel():
                zeros = 1.0 - int(torch.count_nonzero(line)) / len(line)
                least, most = torch.aminmax(line)
                found[:, place] = max(float(most), -float(least)), zeros, 0.0
        for place in np.flatnonzero(~np.isfinite(found[0]) & (found[0] != NOT_MEASURED)).tolist():
            line = flat(tensors[place])
            finite = torch.isfinite(line)
            found[0, place] = float(torch.where(finite, line.abs(), 0).max())
            found[2, place] = len(line) - int(finite.sum())
        return found


@torch.no_grad()
def device_extremes(tensors: Sequence[Tensor], home: torch.device) -> Tensor:
    """The same of tensors on accelerators, on `home`; nobody waits for it."""
    columns = []
    for tensor in tensors:
        line = flat(tensor)
        if not line.numel():
            columns.append(torch.full((3,), NOT_MEASURED, device=home))
            continue
        finite = torch.isfinite(line)
        largest = torch.where(finite, line.abs(), 0).amax().float()
        zeros = (line == 0).sum() / line.numel()
        columns.append(torch.stack([largest, zeros, (~finite).sum().float()]).to(home, non_blocking=True))
    return torch.stack(columns, dim=1)


Finish = Callable[[], tuple[list[int], Any]]


class Updates:
    """Measures ‖Δw‖/‖w‖ of the parameters of one optimizer across a step.

    Args:
        places: Places of the parameters that the optimizer holds.
        parameters: Those parameters; of float8 ones nothing is measured, since torch cannot subtract them.
    """

    def __init__(self, places: Sequence[int], parameters: Sequence[nn.Parameter]) -> None:
        self._kept: dict[int, list[Tensor]] = {}
        self._parts: list[tuple[list[int], list[Tensor]]] = [
            ([places[i] for i in part], [parameters[i] for i in part]) for part in _parts(local(parameters))
        ]
        self._plans: dict[int, CpuNorms | DeviceNorms] = {}

    @torch.no_grad()
    def start(self, turn: int) -> Finish:
        """Copy the weights before the step; of models too large to copy at once, each turn measures another part.

        Returns:
            To be called after the step: gives the places, and for them the norms of the weights and of their changes,
            shape (2, number of places).
        """
        number = turn % len(self._parts)
        places, own = self._parts[number]
        parameters = local(own)
        if not parameters:
            return lambda: ([], np.zeros((2, 0), np.float32))
        before = self._copy(number, parameters)

        @torch.no_grad()
        def finish() -> tuple[list[int], Any]:
            torch._foreach_sub_(before, parameters)
            both = [*parameters, *before]
            plan = self._plans.get(number) or self._plan(number, both)
            try:
                norms = plan(both)
            except (RuntimeError, TypeError):  # the model was moved or cast
                norms = self._plan(number, both)(both)
            return places, norms.reshape(2, -1)

        return finish

    def _copy(self, number: int, parameters: list[Tensor]) -> list[Tensor]:
        kept = self._kept.get(number)
        if kept is not None:
            try:
                torch._foreach_copy_(kept, parameters)
            except RuntimeError:  # of another shape now
                del self._kept[number]
            else:
                return kept
        copies = [parameter.detach().clone() for parameter in parameters]
        if sum(copy.numel() for copy in copies) <= _MOST_KEPT:
            self._kept[number] = copies
        return copies

    def _plan(self, number: int, tensors: Sequence[Tensor]) -> CpuNorms | DeviceNorms:
        is_host = all(map(on_host, tensors))
        plan = CpuNorms(tensors) if is_host else DeviceNorms(tensors, None, len(tensors))
        self._plans[number] = plan
        return plan


def _parts(parameters: Sequence[nn.Parameter]) -> list[list[int]]:
    """Places of the parameters, in parts of at most `MOST_COPIED` elements or one parameter."""
    parts: list[list[int]] = [[]]
    size = 0
    for i, parameter in enumerate(parameters):
        if is_float8(parameter):
            continue
        if parts[-1] and size + parameter.numel() > MOST_COPIED:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += parameter.numel()
    return parts


def update_statistics(places: Sequence[int], measured: Floats, count: int) -> dict[str, Floats]:
    """`weight_norm` and `update_ratio`, each of shape (`count`,), from what `Updates.start` led to."""
    weight_norm = np.full(count, NOT_MEASURED, np.float32)
    update_ratio = np.full(count, NOT_MEASURED, np.float32)
    weights, changes = np.asarray(measured, np.float32).reshape(2, len(places))
    weight_norm[places] = weights
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        update_ratio[places] = np.where(weights > 0, changes / weights, NOT_MEASURED)
    return {"weight_norm": weight_norm, "update_ratio": update_ratio}
