"""Statistics that are sampled every few steps: weights, updates, extremes, zeros and non-finite elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradwatch.backends import torch_device
from gradwatch.backends.torch_device import DeviceNorms
from gradwatch.backends.torch_norms import CpuNorms, flat
from gradwatch.records import NOT_MEASURED, Floats

#: Elements that are looked at together; more would not fit the cache, and cost memory.
_BLOCK = 1 << 20
#: Weights copied at once to measure an update; a larger model is measured part by part, one part a sample.
MOST_COPIED = 1 << 26

GRADIENT_STATISTICS = ("grad_max", "zero_fraction", "nonfinite_count")


@torch.no_grad()
def gradient_extremes(grads: Sequence[Tensor | None]) -> npt.NDArray[np.float32] | Tensor:
    """Largest finite magnitude, share of exact zeros and number of non-finite elements of gradients.

    Args:
        grads: Gradients of the p parameters.

    Returns:
        Shape (3, p), in the order of `GRADIENT_STATISTICS`; `NOT_MEASURED` without gradient. Numpy for gradients on the
        host; those of an accelerator stay there, and nobody waits for them.
    """
    home = next((grad.device for grad in grads if grad is not None and grad.device.type not in torch_device.HOST), None)
    return _host_extremes(grads) if home is None else _device_extremes(grads, home)


def _host_extremes(grads: Sequence[Tensor | None]) -> npt.NDArray[np.float32]:
    found = np.full((3, len(grads)), NOT_MEASURED, np.float32)
    for places, block in _blocks(grads):
        largest = torch.maximum(block.amax(1), -block.amin(1)).float().numpy().copy()
        found[1, places] = 1.0 - block.bool().sum(1).numpy() / block.shape[1]
        found[2, places] = 0.0
        for row in np.flatnonzero(~np.isfinite(largest)):
            line = block[int(row)]
            finite = torch.isfinite(line)
            found[2, places[row]] = len(line) - int(finite.sum())
            largest[row] = float(torch.where(finite, line.abs(), 0).max())
        found[0, places] = largest
    return found


def _device_extremes(grads: Sequence[Tensor | None], home: torch.device) -> Tensor:
    columns = []
    for grad in grads:
        line = None if grad is None else flat(grad)
        if line is None or not line.numel():
            columns.append(torch.full((3,), NOT_MEASURED, device=home))
            continue
        finite = torch.isfinite(line)
        largest = torch.where(finite, line.abs(), 0).amax().float()
        zeros = (line == 0).sum() / line.numel()
        columns.append(torch.stack([largest, zeros, (~finite).sum().float()]).to(home, non_blocking=True))
    return torch.stack(columns, dim=1)


def _blocks(tensors: Sequence[Tensor | None]) -> Iterator[tuple[list[int], Tensor]]:
    """Non-empty tensors of one shape and type as rows of a matrix, with their places."""
    kinds: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor is None or not tensor.numel():
            continue
        if tensor.layout is not torch.strided or tensor.is_complex() or not tensor.is_contiguous():
            line = flat(tensor)
            if len(line):
                yield [place], line.view(1, -1)
        else:
            kinds.setdefault((tensor.shape, tensor.dtype), []).append(place)
    for (shape, _), places in kinds.items():
        size = shape.numel()
        together = max(_BLOCK // size, 1)
        for start in range(0, len(places), together):
            chosen = places[start : start + together]
            members = [tensor for place in chosen if (tensor := tensors[place]) is not None]
            block = members[0] if len(members) == 1 else torch.stack(members)
            yield chosen, block.view(len(members), size)


class Updates:
    """Measures ‖Δw‖/‖w‖ across one optimizer step.

    Args:
        places: Places of the parameters that the optimizer holds.
        parameters: Those parameters.
        turn: Counts the samples: of models too large to copy, each sample measures another part.
    """

    @torch.no_grad()
    def __init__(self, places: Sequence[int], parameters: Sequence[nn.Parameter], *, turn: int = 0) -> None:
        chosen = _part(parameters, turn)
        self._places = [places[i] for i in chosen]
        self._parameters = [parameters[i] for i in chosen]
        self._before = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def finish(self) -> tuple[list[int], npt.NDArray[np.float32] | Tensor]:
        """The places, and for them `weight_norm` after the step and ‖Δw‖: shape (2, number of places)."""
        now = [parameter.detach() for parameter in self._parameters]
        if not now:
            return [], np.empty((2, 0), np.float32)
        torch._foreach_sub_(self._before, now)
        if all(tensor.device.type in torch_device.HOST for tensor in now):
            norms = CpuNorms(now)
            return self._places, np.stack([norms(now), norms(self._before)])
        device_norms = DeviceNorms(now, None, len(now))
        return self._places, torch.stack([device_norms(now), device_norms(self._before)])


def _part(parameters: Sequence[nn.Parameter], turn: int) -> Sequence[int]:
    """Places of the parameters whose turn it is."""
    if sum(parameter.numel() for parameter in parameters) <= MOST_COPIED:
        return range(len(parameters))
    parts: list[list[int]] = [[]]
    size = 0
    for i, parameter in enumerate(parameters):
        if parts[-1] and size + parameter.numel() > MOST_COPIED:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += parameter.numel()
    return parts[turn % len(parts)]


def update_statistics(places: Sequence[int], measured: Floats, count: int) -> dict[str, Floats]:
    """`weight_norm` and `update_ratio`, each of shape (`count`,), from what `Updates.finish` gave."""
    weight_norm = np.full(count, NOT_MEASURED, np.float32)
    update_ratio = np.full(count, NOT_MEASURED, np.float32)
    weights, changes = np.asarray(measured, np.float32).reshape(2, len(places))
    weight_norm[places] = weights
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        update_ratio[places] = np.where(weights > 0, changes / weights, NOT_MEASURED)
    return {"weight_norm": weight_norm, "update_ratio": update_ratio}
