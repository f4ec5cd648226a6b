"""Small tensors copied side by side, so that a few kernels serve them all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Tensors up to this many elements go into a slab; copying larger ones costs more than a kernel each.
SMALL = 8192
#: Elements of a slab at most: one megabyte stays in the processor's cache between copy and kernel.
_MOST = 1 << 18
#: Shortest and longest line. Squares of a line are added up in float32: up to 1,024 the error stays near 1e-7.
_SHORT, LINE = 64, 1024
#: So many tensors of one shape are stacked; fewer are copied one by one.
_STACKED = 8


class Slab:
    """Lines of equal length that hold some small tensors, each padded with zeros to whole lines.

    Args:
        tensors: Examples of the tensors to come, CPU and dense: same shapes.
        places: Where they stand among those that `fill` is given.
        buffer: float32, where the lines are; may be shared by slabs that are filled in turn.

    Attributes:
        places: The tensors' places, in the order of their lines.
        starts: First line of each tensor.
        sizes: Elements of each tensor.
        lines: The lines, shape (number of lines, length).
    """

    def __init__(self, tensors: Sequence[Tensor], places: Sequence[int], buffer: Tensor) -> None:
        by_kind: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for place in places:
            by_kind.setdefault((tensors[place].shape, tensors[place].dtype), []).append(place)
        length = _line(shape.numel() for shape, _ in by_kind)
        self.places: list[int] = []
        self._stacks: list[tuple[Any, Tensor]] = []
        self._singles: list[tuple[int, Tensor]] = []
        counts: list[int] = []
        begin, self._is_padded = 0, False
        for (shape, dtype), members in by_kind.items():
            size = shape.numel()
            lines = -(-size // length)
            self._is_padded |= size % length > 0
            end = begin + lines * length * len(members)
            slots = buffer[begin:end].view(len(members), -1)[:, :size].view(-1, *shape)
            if len(members) >= _STACKED and dtype is torch.float32:
                self._stacks.append((itemgetter(*members), slots))
            else:
                self._singles += zip(members, slots.unbind(), strict=True)
            self.places += members
            counts += [lines] * len(members)
            begin = end
        self.starts: npt.NDArray[np.intp] = np.cumsum([0, *counts[:-1]], dtype=np.intp)
        self.sizes = np.array([tensors[place].numel() for place in self.places])
        self.lines = buffer[:begin].view(-1, length)

    def fill(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy the tensors into the lines, and return these."""
        if self._is_padded:
            self.lines.zero_()
        for pick, slots in self._stacks:
            torch.stack(pick(tensors), out=slots)
        if self._singles:
            torch._foreach_copy_([slot for _, slot in self._singles], [tensors[place] for place, _ in self._singles])
        return self.lines


def slabs(tensors: Sequence[Tensor], places: Sequence[int]) -> list[Slab]:
    """Slabs for the tensors at these places, which share a buffer: fill one, use it, then the next."""
    parts = list(_parts(tensors, places))
    room = max((sum(tensors[place].numel() + _SHORT for place in part) for part in parts), default=0)
    buffer = torch.zeros(room)
    return [Slab(tensors, part, buffer) for part in parts]


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor may go into a slab; a float64 one would lose digits there."""
    is_plain = tensor.layout is torch.strided and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return is_plain and 0 < tensor.numel() <= SMALL


def _parts(tensors: Sequence[Tensor], places: Sequence[int]) -> Iterator[list[int]]:
    """The places in parts of at most `_MOST` elements, tensors of one size behind each other, in whole lines first."""
    part: list[int] = []
    size = 0
    sizes = {place: tensors[place].numel() for place in places}
    for place in sorted(places, key=lambda i: (sizes[i] % _SHORT > 0, sizes[i])):
        needed = sizes[place] + _SHORT
        if part and size + needed > _MOST:
            yield part
            part, size = [], 0
        part.append(place)
        size += needed
    if part:
        yield part


def _line(sizes: Iterator[int]) -> int:
    """The longest line that divides all sizes; the shortest where that would be shorter still."""
    common = math.gcd(*sizes)
    return next((n for n in range(min(common, LINE), _SHORT, -1) if common % n == 0), _SHORT)
