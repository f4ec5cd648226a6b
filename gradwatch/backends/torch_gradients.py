"""The gradients of a set of torch parameters: which are there, their norms, and whether they changed since."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.backends.torch_device import DeviceNorms, on_host
from gradwatch.backends.torch_norms import CpuNorms
from gradwatch.backends.torch_statistics import CpuExtremes, Updates, device_extremes
from gradwatch.records import NOT_MEASURED

#: Plans kept, one for each set of parameters that had a gradient.
_MOST_PLANS = 32

_GRAD, _VERSION = attrgetter("grad"), attrgetter("_version")
Grads = list[Tensor | None]


@dataclass(slots=True)
class Measurement:
    """Norms at one moment, and what tells whether the gradients are still the same.

    Args:
        norms: float32, shape (p,), numpy or, of gradients on an accelerator, a tensor there; `NOT_MEASURED`
            without gradient.
        grads: The p gradients, None without.
        versions: Their version counters, which every change in place raises; 0 without gradient.
        is_damaged: Whether a norm is known not to be finite.
    """

    norms: Any
    grads: Grads
    versions: list[int]
    is_damaged: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_damaged = is_damaged(self.norms)

    def changed(self, held: Held) -> list[int]:
        """The places whose gradient is another one than was measured, or was changed in place."""
        then, versions = held.of(self.grads), held.of(self.versions)
        now: Grads = list(map(_GRAD, held.parameters))
        try:
            if all(map(is_, now, then)) and list(map(_VERSION, now)) == versions:
                return []
        except AttributeError:  # of a None
            if _versions(now) == versions:
                return []
        return [
            place
            for place, new, old, version in zip(held.places, now, then, versions, strict=True)
            if new is not old or (new is not None and new._version != version)
        ]

    def accept_changes(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the gradients as they are now for the measured ones: the change is known."""
        now: Grads = list(map(_GRAD, parameters))
        self.grads = [None if old is None else new for old, new in zip(self.grads, now, strict=False)]
        self.versions = _versions(self.grads)

    def forget(self, held: Held) -> None:
        """Let go of gradients that have been used."""
        if held.is_all:
            self.grads = [None] * len(self.grads)
        else:
            for place in held.places:
                self.grads[place] = None


def is_damaged(norms: Any) -> bool:
    """Whether a norm is not finite; on an accelerator nobody waits to find out."""
    return isinstance(norms, np.ndarray) and not math.isfinite(norms.max(initial=0.0))


class Held:
    """The parameters that one optimizer holds.

    Args:
        parameters: Group by group.
        places: Their columns.
        count: Number p of all columns.
        number: The optimizer's number, in order of appearance.
    """

    def __init__(self, parameters: list[nn.Parameter], places: list[int], count: int, *, number: int) -> None:
        self.parameters, self.places, self.number = parameters, places, number
        self._count = count
        self.is_all = places == list(range(count))
        self.index = np.array(places, np.intp)
        self._device_index: Tensor | None = None
        self._updates: Updates | None = None

    def of(self, every: list[Any]) -> list[Any]:
        """The items of a list of all p that belong to these parameters."""
        return every if self.is_all else [every[place] for place in self.places]

    def part(self, every: Any) -> Any:
        """The entries of an array or tensor of shape (p,) that belong to these parameters."""
        if self.is_all and len(every) == len(self.places):
            return every
        if isinstance(every, np.ndarray):
            return every[self.index]
        if self._device_index is None or self._device_index.device != every.device:
            self._device_index = torch.as_tensor(self.index).to(every.device)
        return every.index_select(0, self._device_index)

    @property
    def updates(self) -> Updates:
        """Measures how much a step changes these parameters."""
        if self._updates is None:
            self._updates = Updates(self.places, self.parameters)
        return self._updates

    def is_current(self, parameters: list[nn.Parameter], count: int) -> bool:
        """Whether the optimizer still holds the same, and there are still as many columns."""
        same = count == self._count and len(parameters) == len(self.parameters)
        return same and all(map(is_, parameters, self.parameters))


class Gradients:
    """Measures the gradients of a growing list of parameters.

    Args:
        parameters: The p parameters, in column order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._plans: dict[tuple[int, ...] | None, CpuNorms | DeviceNorms] = {}
        self._extremes: dict[tuple[int, ...], CpuExtremes] = {}
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def add(self, parameter: nn.Parameter) -> None:
        """Take one parameter more, which becomes the last column."""
        self.parameters.append(parameter)
        self._plans.clear()

    def measure(self, held: Held | None = None) -> Measurement:
        """Norms of the gradients of these parameters, of all by default; the gradients are not touched."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.measure(held)
        if held is None or held.is_all:
            grads: Grads = list(map(_GRAD, self.parameters))
        else:
            grads = [None] * len(self.parameters)
            for place, parameter in zip(held.places, held.parameters, strict=True):
                grads[place] = parameter.grad
        try:
            versions = list(map(_VERSION, grads))
        except AttributeError:  # of a None
            versions = _versions(grads)
            present = [grad is not None for grad in grads]
            places = tuple(compress(range(len(grads)), present))
            return Measurement(self._norms(list(compress(grads, present)), places), grads, versions)
        return Measurement(self._norms(grads, None), grads, versions)

    def extremes(self, grads: Grads) -> Any:
        """Sampled statistics of gradients, shape (3, number of gradients), in the order of `GRADIENT_STATISTICS`.

        Numpy for gradients on the host; those of an accelerator stay there. `NOT_MEASURED` without gradient.
        """
        places = tuple(i for i, grad in enumerate(grads) if grad is not None)
        present = [grad for grad in grads if grad is not None]
        home = next((grad.device for grad in present if not on_host(grad)), None)
        if home is not None:
            found = torch.full((3, len(grads)), NOT_MEASURED, device=home)
            measured = device_extremes(present, home)
            return measured if len(places) == len(grads) else found.index_copy_(1, self._index(places, home), measured)
        if len(self._extremes) >= _MOST_PLANS:
            self._extremes.clear()
        plan = self._extremes.get(places) or self._extremes.setdefault(places, CpuExtremes(present))
        try:
            numbers = plan(present)
        except (RuntimeError, TypeError):
            self._extremes[places] = CpuExtremes(present)
            numbers = self._extremes[places](present)
        if len(places) == len(grads):
            return numbers
        every = np.full((3, len(grads)), NOT_MEASURED, np.float32)
        every[:, places] = numbers
        return every

    def _index(self, places: tuple[int, ...], home: torch.device) -> Tensor:
        key = (places, home)
        if key not in self._indices:
            self._indices[key] = torch.as_tensor(places).to(home)
        return self._indices[key]

    def _norms(self, grads: list[Any], places: tuple[int, ...] | None) -> Any:
        """Norms at all places, of gradients that stand at these (None: all)."""
        if not grads:
            return np.full(len(self.parameters), NOT_MEASURED, np.float32)
        plan = self._plans.get(places)
        try:
            found = (plan or self._planned(grads, places))(grads)
        except (RuntimeError, TypeError):
            # A gradient changed its layout, shape or device (a sparse one became dense): plan again.
            found = self._planned(grads, places)(grads)
        if places is None or isinstance(found, Tensor):
            return found
        norms = np.full(len(self.parameters), NOT_MEASURED, np.float32)
        norms[list(places)] = found
        return norms

    def _planned(self, grads: list[Tensor], places: tuple[int, ...] | None) -> CpuNorms | DeviceNorms:
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        is_host = all(map(on_host, grads))
        plan = CpuNorms(grads) if is_host else DeviceNorms(grads, places, len(self.parameters))
        self._plans[places] = plan
        return plan


def _versions(grads: Sequence[Tensor | None]) -> list[int]:
    return [0 if grad is None else grad._version for grad in grads]
