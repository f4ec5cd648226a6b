"""Norms of many tensors at once, in float32 or better, with few kernels and without touching them.

Three traps decide the shape of this file. On CPU a kernel per tensor costs more than its arithmetic, so small tensors
of one shape are stacked. Torch's CPU norm adds up float32 squares in a few long lanes (relative error 4e-5 at two
million elements, 3e-3 at forty million), so long tensors are cut into rows, whose norms are added up in float64. And
squares of float32 overflow above 1.8e19 and vanish below 1e-23, so such norms are taken again in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Longest run of squares that is added up in float32: the error stays near 1e-7.
ROW = 1024
#: Tensors up to this many elements are stacked with others of their shape; copying larger ones costs more than a
#: kernel.
STACK_LIMIT = 8192
#: Stacking fewer than this many tensors gains nothing.
STACK_MINIMUM = 4
#: Norms up to this many are taken again one by one, more of them all at once.
_MANY = 16
#: Below this the float32 squares of a tensor have lost digits.
TINY = 1e-17


@dataclass(frozen=True)
class _Stack:
    """Small tensors of one shape and type: one copy, one kernel."""

    pick: Callable[[Sequence[Tensor]], Any]
    row: int

    def norms(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        together = torch.stack(self.pick(tensors)).view(-1, self.row)
        norms: Tensor = torch.linalg.vector_norm(together, dim=1, dtype=dtype)
        return norms


class CpuNorms:
    """L2 norms of a fixed list of CPU tensors, planned once.

    Args:
        tensors: Examples of the tensors to come: same number, shapes, layouts and types.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._stacks: list[_Stack] = []
        self._short: list[int] = []
        self._long: list[int] = []
        by_kind: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(tensors):
            if _is_plain(tensor) and 0 < tensor.numel() <= STACK_LIMIT and _row_length(tensor.numel()):
                by_kind.setdefault((tensor.shape, tensor.dtype), []).append(i)
            else:
                self._long.append(i)
        order: list[int] = []
        counts: list[int] = []
        for (shape, _), places in by_kind.items():
            if len(places) >= STACK_MINIMUM:
                row = _row_length(shape.numel())
                self._stacks.append(_Stack(itemgetter(*places), row))
                order += places
                counts += [shape.numel() // row] * len(places)
            else:
                (self._short if shape.numel() <= ROW else self._long).extend(places)
        self._places: npt.NDArray[np.intp] = np.array([*order, *self._short, *self._long], dtype=np.intp)
        self._counts = counts + [1] * len(self._short)
        self._starts = _starts(self._counts) if not self._long else None
        self._zeros: bytes = b""

    def __call__(self, tensors: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Norms in the order of the tensors, float32, shape (number of tensors,)."""
        norms = self._measure(tensors, torch.float32)
        if not (norms.max(initial=0.0) < np.inf and norms.min(initial=1.0) >= TINY):
            norms = self._second_look(norms, tensors)
        with np.errstate(over="ignore"):
            return norms.astype(np.float32)

    def _second_look(self, norms: npt.NDArray[np.float64], tensors: Sequence[Tensor]) -> npt.NDArray[np.float64]:
        """Norms that float32 squares cannot be trusted for, from float64 ones."""
        weak, huge, zero = norms < TINY, np.isposinf(norms), norms == 0.0
        # What is exactly zero step after step is looked at twice only once.
        if huge.any() or (weak & ~zero).any() or zero.tobytes() != self._zeros:
            doubtful = np.flatnonzero(weak | huge)
            if len(doubtful) > _MANY:
                norms[doubtful] = self._measure(tensors, torch.float64)[doubtful]
            else:
                norms[doubtful] = [
                    float(torch.linalg.vector_norm(flat(tensors[i]).double())) for i in doubtful.tolist()
                ]
            self._zeros = np.equal(norms, 0.0).tobytes()
        return norms

    def _measure(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> npt.NDArray[np.float64]:
        parts = [stack.norms(tensors, dtype) for stack in self._stacks]
        if self._short:
            parts.append(torch.stack(torch._foreach_norm([tensors[i] for i in self._short], 2, dtype=dtype)))
        starts = self._starts
        if starts is None:
            counts = list(self._counts)
            for i in self._long:
                pieces = _row_norms(tensors[i], dtype)
                parts += pieces
                counts.append(sum(map(len, pieces)))
            starts = _starts(counts)
        norms = np.zeros(len(tensors))
        if parts:
            partial = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
            if len(partial) > len(starts):
                norms[self._places] = np.sqrt(np.add.reduceat(np.square(partial, dtype=np.float64), starts))
            else:
                norms[self._places] = partial
        return norms


def tensor_norms(tensors: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """L2 norms of CPU tensors that are measured once, float32, shape (number of tensors,)."""
    return CpuNorms(tensors)(tensors)


def values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as a real, dense one: duplicates of a sparse gradient are summed."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def flat(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as a vector in the order of memory, so that nothing is copied where it can be avoided."""
    tensor = values(tensor)
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_complex() and tensor.dtype is not torch.float64


def _starts(counts: list[int]) -> npt.NDArray[np.intp]:
    ends = np.cumsum(counts, dtype=np.intp)
    return ends - np.array(counts, dtype=np.intp)


def _row_length(size: int) -> int:
    """The largest divisor of `size` that is at most ROW; 0 when that would make more than 64 rows of a small tensor."""
    if size <= ROW:
        return size
    row = next(n for n in range(ROW, 0, -1) if size % n == 0)
    return row if row >= 64 else 0


def _row_norms(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Norms of rows of the tensor, and of what is left over; at least one number."""
    if tensor.dtype in (torch.float64, torch.complex128):
        dtype = torch.float64
    line = flat(tensor)
    size = line.numel()
    if size <= ROW:
        return [torch.linalg.vector_norm(line, dtype=dtype).view(1)]
    rest = size % ROW
    if not rest:
        return [torch.linalg.vector_norm(line.view(-1, ROW), dim=1, dtype=dtype)]
    rows = torch.linalg.vector_norm(line[: size - rest].view(-1, ROW), dim=1, dtype=dtype)
    return [rows, torch.linalg.vector_norm(line[size - rest :], dtype=dtype).view(1)]
