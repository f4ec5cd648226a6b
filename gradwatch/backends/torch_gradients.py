"""The gradients of a set of torch parameters: which are there, their norms, and whether they changed since."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.backends.torch_device import DeviceNorms, on_host
from gradwatch.backends.torch_norms import CpuNorms
from gradwatch.backends.torch_partial import may_be_partial
from gradwatch.backends.torch_sharding import is_dtensor, is_partial, local
from gradwatch.backends.torch_statistics import CpuExtremes, Updates, device_extremes
from gradwatch.records import NOT_MEASURED

#: Plans kept, one for each set of parameters that had a gradient.
_MOST_PLANS = 32

_GRAD, _VERSION = attrgetter("grad"), attrgetter("_version")
Grads = list[Tensor | None]


class Present:
    """Which of p gradients are there.

    Args:
        places: Where they stand.
        count: The number p.
    """

    def __init__(self, places: Sequence[int], count: int) -> None:
        self.places = list(places)
        self.is_all = len(self.places) == count
        self.index = np.array(self.places, np.intp)
        absent = sorted(set(range(count)).difference(self.places))
        self._absent, self._nothing = _picker(absent), (None,) * len(absent)
        self._pick = _picker(self.places)

    def of(self, every: Grads) -> Sequence[Any] | None:
        """Those that are there; None when they are others than these."""
        if self.is_all:
            return every
        return self._pick(every) if self._absent(every) == self._nothing else None


class Measurement:
    """Norms at one moment, and what tells whether the gradients are still the same.

    Args:
        norms: float32, shape (p,), numpy or, of gradients on an accelerator, a tensor there; `NOT_MEASURED`
            without gradient.
        grads: The p gradients, None without.
        present: Which there are.
        versions: Their version counters, which every change in place raises.

    Attributes:
        is_damaged: Whether a norm is known not to be finite.
    """

    __slots__ = ("_measured", "_present", "_versions", "grads", "is_damaged", "norms")

    def __init__(self, norms: Any, grads: Grads, present: Present, versions: list[int]) -> None:
        self.norms, self.grads, self._present, self._versions = norms, grads, present, versions
        self._measured: Sequence[Any] | None = present.of(grads)
        self.is_damaged = is_damaged(norms)

    def changed(self, held: Held) -> list[int]:
        """The places whose gradient is another one than was measured, or was changed in place."""
        now: Grads = list(map(_GRAD, held.parameters))
        if self._measured is not None and held.is_same(self._present):
            try:
                if all(map(is_, now, self._measured)) and list(map(_VERSION, now)) == self._versions:
                    return []
            except AttributeError:  # of a None: one has gone
                pass
        versions = dict(zip(self._present.places, self._versions, strict=True))
        return [
            place
            for place, new in zip(held.places, now, strict=True)
            if new is not self.grads[place] or (new is not None and new._version != versions.get(place))
        ]

    def accept_changes(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the gradients as they are now for the measured ones: the change is known."""
        now: Grads = list(map(_GRAD, parameters))
        self.grads = [None if old is None else new for old, new in zip(self.grads, now, strict=False)]
        self._present = _present_in(self.grads)
        self._measured = self._present.of(self.grads)
        self._versions = list(map(_VERSION, self._measured or ()))

    def forget(self, held: Held) -> None:
        """Let go of gradients that have been used."""
        self._measured = None
        if held.is_all:
            self.grads = [None] * len(self.grads)
        else:
            for place in held.places:
                self.grads[place] = None


def is_damaged(norms: Any) -> bool:
    """Whether a norm is not finite; on an accelerator nobody waits to find out."""
    return isinstance(norms, np.ndarray) and not math.isfinite(np.maximum.reduce(norms, initial=0.0))


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What picks the items at these places, as a tuple."""
    if len(places) > 1:
        pick: Callable[[Sequence[Any]], tuple[Any, ...]] = itemgetter(*places)
        return pick
    return lambda every: tuple(every[place] for place in places)


def _present_in(grads: Grads) -> Present:
    return Present([place for place, grad in enumerate(grads) if grad is not None], len(grads))


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
        self._same: Present | None = None
        self._device_index: Tensor | None = None
        self._updates: Updates | None = None

    def is_same(self, present: Present) -> bool:
        """Whether exactly these parameters have a gradient, in this order."""
        if present is self._same:
            return True
        if present.places == self.places:
            self._same = present
            return True
        return False

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
        self._is_sharded = any(map(is_dtensor, parameters))
        self._copies = [place for place, each in enumerate(parameters) if self._is_sharded and may_be_partial(each)]
        self._present = Present(range(len(self.parameters)), len(self.parameters))
        self._plans: dict[tuple[int, ...], CpuNorms | DeviceNorms] = {}
        self._plan: CpuNorms | DeviceNorms | None = None
        self._extremes: dict[tuple[int, ...], CpuExtremes] = {}
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def add(self, parameter: nn.Parameter) -> None:
        """Take one parameter more, which becomes the last column."""
        self.parameters.append(parameter)
        self._plans.clear()
        self._present, self._plan = Present([], len(self.parameters)), None

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
            measured = self._present.of(grads)
            versions = None if measured is None else list(map(_VERSION, measured))
        except AttributeError:  # of a None
            versions = None
        if measured is None or versions is None:
            measured = self._find(grads)
            versions = list(map(_VERSION, measured))
        norms = self._norms(measured)
        if self._copies:
            norms = self._without_sums(norms, grads)
        return Measurement(norms, grads, self._present, versions)

    def _find(self, grads: Grads) -> Sequence[Any]:
        """Note which gradients there are, other ones than last time; these."""
        self._present = _present_in(grads)
        self._plan = self._plans.get(tuple(self._present.places))
        return self._present.of(grads) or ()

    def extremes(self, grads: Grads) -> Any:
        """Sampled statistics of gradients, shape (3, number of gradients), in the order of `GRADIENT_STATISTICS`.

        Numpy for gradients on the host; those of an accelerator stay there. `NOT_MEASURED` without gradient.
        """
        if self._copies:
            grads = [None if is_partial(grad) else grad for grad in grads]
        places = tuple(i for i, grad in enumerate(grads) if grad is not None)
        present = local([grad for grad in grads if grad is not None])
        plan = self._extremes.get(places)
        is_home = plan is not None and (not present or on_host(present[0]))
        home = None if is_home else next((grad.device for grad in present if not on_host(grad)), None)
        if home is not None:
            found = torch.full((3, len(grads)), NOT_MEASURED, device=home)
            measured = device_extremes(present, home)
            return measured if len(places) == len(grads) else found.index_copy_(1, self._index(places, home), measured)
        if plan is None:
            if len(self._extremes) >= _MOST_PLANS:
                self._extremes.clear()
            plan = self._extremes[places] = CpuExtremes(present)
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

    def _norms(self, measured: Sequence[Any]) -> Any:
        """Norms at all places, of the gradients that are there."""
        if not measured:
            return np.full(len(self.parameters), NOT_MEASURED, np.float32)
        if self._is_sharded:
            measured = local(measured)
        try:
            found = (self._plan or self._planned(measured))(measured)
        except (RuntimeError, TypeError):
            # A gradient changed its layout, shape or device (a sparse one became dense): plan again.
            found = self._planned(measured)(measured)
        if self._present.is_all or isinstance(found, Tensor):
            return found
        norms = np.full(len(self.parameters), NOT_MEASURED, np.float32)
        norms[self._present.index] = found
        return norms

    def _without_sums(self, norms: Any, grads: Grads) -> Any:
        """The norms but those of gradients that are still sums over ranks, of which this rank has a term."""
        sums = [place for place in self._copies if is_partial(grads[place])]
        if not sums:
            return norms
        if isinstance(norms, Tensor):
            return norms.index_fill(0, self._index(tuple(sums), norms.device), NOT_MEASURED)
        norms[sums] = NOT_MEASURED
        return norms

    def _planned(self, measured: Sequence[Tensor]) -> CpuNorms | DeviceNorms:
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        places = tuple(self._present.places)
        if all(map(on_host, measured)):
            self._plan = CpuNorms(measured)
        else:
            self._plan = DeviceNorms(measured, None if self._present.is_all else places, len(self.parameters))
        self._plans[places] = self._plan
        return self._plan
