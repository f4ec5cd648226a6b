"""The gradients of a set of torch parameters: which are there, their norms, and whether they changed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradwatch.backends.torch_norms import CpuNorms, device_norms, exact_norm
from gradwatch.records import NOT_MEASURED


@dataclass
class Measurement:
    """Norms at one moment, and what tells whether the gradients are still the same.

    Args:
        norms: float32, shape (p,); `NOT_MEASURED` without gradient. Divided by `scale` they are the true ones.
        grads: The gradient tensors, by place.
        versions: Their version counters, which every change in place raises.
        scale: The loss scale that the gradients carried.
    """

    norms: npt.NDArray[np.float32]
    grads: dict[int, Tensor] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    scale: float = 1.0

    def changed(self, places: Sequence[int], parameters: Sequence[nn.Parameter]) -> list[int]:
        """The places whose gradient is another one than was measured, or was changed in place."""
        grads, versions = self.grads, self.versions
        return [
            place
            for place in places
            if (grad := parameters[place].grad) is not grads.get(place)
            or (grad is not None and grad._version != versions[place])
        ]

    def accept_changes(self) -> None:
        """Take the gradients as they are now for the measured ones: the change is known."""
        self.versions = {place: grad._version for place, grad in self.grads.items()}

    def forget(self, places: Sequence[int]) -> None:
        """Let go of gradients that have been used."""
        for place in places:
            self.grads.pop(place, None)

    def true_norms(self, places: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Norms at these places without the loss scale."""
        norms = self.norms[places]
        return norms if self.scale == 1.0 else norms / np.float32(self.scale)


class Gradients:
    """Measures the gradients of a growing list of parameters.

    Args:
        parameters: The p parameters, in column order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._planned: dict[int, tuple[list[int], CpuNorms]] = {}

    @torch.no_grad()
    def measure(self, places: Sequence[int]) -> Measurement:
        """Norms of the gradients at these places; the gradients are not touched."""
        parameters = self.parameters
        grads = {place: grad for place in places if (grad := parameters[place].grad) is not None}
        norms = np.full(len(parameters), NOT_MEASURED, np.float32)
        if grads:
            present = list(grads)
            norms[present] = self._norms(present, list(grads.values()))
            for place in np.flatnonzero(np.isposinf(norms)):
                norms[place] = exact_norm(grads[int(place)])
        return Measurement(norms, grads, {place: grad._version for place, grad in grads.items()})

    def _norms(self, places: list[int], grads: list[Tensor]) -> npt.NDArray[np.float32]:
        if any(grad.device.type != "cpu" for grad in grads):
            return _norms_by_device(grads)
        key = hash(tuple(places))
        planned = self._planned.get(key)
        if planned is None or planned[0] != places:
            self._planned[key] = planned = (places, CpuNorms(grads))
        try:
            return planned[1](grads)
        except RuntimeError:
            # A gradient changed its layout or shape (a sparse one became dense): plan again.
            self._planned[key] = planned = (places, CpuNorms(grads))
            return planned[1](grads)


def _norms_by_device(grads: list[Tensor]) -> npt.NDArray[np.float32]:
    norms = np.empty(len(grads), np.float32)
    for device in {grad.device for grad in grads}:
        places = [i for i, grad in enumerate(grads) if grad.device == device]
        norms[places] = device_norms([grads[i] for i in places]).cpu().numpy()
    return norms
