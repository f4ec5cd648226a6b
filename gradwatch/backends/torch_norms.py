"""Norms of many tensors at once, in float32 or better, with few kernels and without touching them.

Two traps decide the shape of this file. On CPU a kernel per tensor costs more than its arithmetic, so small tensors of
one shape are stacked. And torch's CPU norm adds up float32 squares in a few long lanes (relative error 4e-5 at two million
elements, 3e-3 at forty million), so long tensors are cut into rows, whose norms are added up in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Longest run of squares that is added up in float32: the error stays near 1e-7.
ROW = 1024
#: Tensors up to this many elements are stacked with others of their shape; copying larger ones costs more than a kernel.
STACK_LIMIT = 8192
#: Stacking fewer than this many tensors gains nothing.
STACK_MINIMUM = 4


@dataclass(frozen=True)
class _Stack:
    """Small tensors of one shape and type: one copy, one kernel."""

    places: list[int]
    row: int

    def partial_norms(self, tensors: Sequence[Tensor]) -> Tensor:
        together = torch.stack([tensors[i] for i in self.places])
        return torch.linalg.vector_norm(together.view(-1, self.row), dim=1, dtype=torch.float32)


class CpuNorms:
    """L2 norms of a fixed list of CPU tensors, planned once.

    Args:
        tensors: Examples of the tensors to come: same number, shapes, layouts and types.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        by_kind: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        self._single: list[int] = []
        for i, tensor in enumerate(tensors):
            if _stackable(tensor):
                by_kind.setdefault((tensor.shape, tensor.dtype), []).append(i)
            else:
                self._single.append(i)
        self._stacks: list[_Stack] = []
        for (shape, _), places in by_kind.items():
            if len(places) >= STACK_MINIMUM:
                self._stacks.append(_Stack(places, _row_length(shape.numel())))
            else:
                self._single.extend(places)
        order = [i for stack in self._stacks for i in stack.places] + self._single
        self._places: npt.NDArray[np.intp] = np.array(order, dtype=np.intp)

    def __call__(self, tensors: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Norms in the order of the tensors, float32, shape (number of tensors,)."""
        parts: list[Tensor] = []
        counts: list[int] = []
        for stack in self._stacks:
            parts.append(stack.partial_norms(tensors))
            counts.extend([len(parts[-1]) // len(stack.places)] * len(stack.places))
        for i in self._single:
            pieces = _partial_norms(tensors[i])
            parts.extend(pieces)
            counts.append(sum(map(len, pieces)))
        norms = np.zeros(len(tensors), np.float32)
        if parts:
            partial = torch.cat(parts).numpy()
            starts = np.cumsum(counts) - counts
            with np.errstate(over="ignore", invalid="ignore"):
                squares = np.square(partial, dtype=np.float64)
                norms[self._places] = np.sqrt(np.add.reduceat(squares, starts))
        return norms


def device_norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms of tensors of one accelerator, left there: float32, shape (number of tensors,)."""
    dense = [values(tensor) for tensor in tensors]
    return torch.stack(torch._foreach_norm(dense, 2, dtype=torch.float32))


def values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as a real, dense one: duplicates of a sparse gradient are summed."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def exact_norm(tensor: Tensor) -> float:
    """L2 norm in float64, for tensors whose squares overflow float32."""
    return float(torch.linalg.vector_norm(values(tensor), dtype=torch.float64))


def _stackable(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or not 0 < tensor.numel() <= STACK_LIMIT or tensor.is_complex():
        return False
    return tensor.dtype is not torch.float64 and _row_length(tensor.numel()) > 0


def _row_length(size: int) -> int:
    """The largest divisor of `size` that is at most ROW; 0 when that would make more than 64 rows of a small tensor."""
    if size <= ROW:
        return size
    row = next(n for n in range(ROW, 0, -1) if size % n == 0)
    return row if row >= 64 else 0


def _partial_norms(tensor: Tensor) -> list[Tensor]:
    """Norms of rows of the tensor, and of what is left over; at least one number."""
    flat = values(tensor).reshape(-1)
    dtype = torch.float64 if flat.dtype is torch.float64 else torch.float32
    if len(flat) <= ROW:
        return [torch.linalg.vector_norm(flat, dtype=dtype).view(1)]
    whole = len(flat) // ROW * ROW
    parts = [torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=dtype)]
    if whole < len(flat):
        parts.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype).view(1))
    return parts
