"""Norms of many tensors at once, in float32 or better, with few kernels and without touching them.

Three traps decide the shape of this file. On CPU a kernel per tensor costs more than its arithmetic, so small tensors
are copied into slabs. Torch's CPU norm adds up float32 squares in a few long lanes (relative error 4e-5 at two million
elements, 3e-3 at forty million), so tensors are cut into rows, whose norms are added up in float64. And squares of
float32 overflow above 1.8e19 and vanish below 1e-23, so such norms are taken again in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradwatch.backends.torch_slab import LINE, is_small, slabs

#: Norms up to this many are taken again one by one, more of them all at once.
_MANY = 16
#: Below this the float32 squares of a tensor have lost digits.
TINY = 1e-17


class CpuNorms:
    """L2 norms of a fixed list of CPU tensors, planned once.

    Args:
        tensors: Examples of the tensors to come: same number, shapes, layouts and types.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        small = [i for i, tensor in enumerate(tensors) if is_small(tensor)]
        self._slabs = slabs(tensors, small)
        #: Large tensors in equal rows: place and length of a row.
        self._rows: list[tuple[int, int]] = []
        self._others: list[int] = []
        places = [place for slab in self._slabs for place in slab.places]
        counts = [len(slab.lines) for slab in self._slabs]
        starts = [slab.starts for slab in self._slabs]
        for i in sorted(set(range(len(tensors))) - set(small)):
            if row := _row_length(tensors[i]):
                self._rows.append((i, row))
                places.append(i)
                starts.append(np.zeros(1, np.intp))
                counts.append(tensors[i].numel() // row)
            else:
                self._others.append(i)
        self._places: npt.NDArray[np.intp] = np.array(places, np.intp)
        offsets = np.cumsum([0, *counts])
        self._starts = np.concatenate([start + offset for start, offset in zip(starts, offsets, strict=False)] or [[]])
        self._partial = torch.empty(int(offsets[-1]))
        self._outs = [self._partial[low:high] for low, high in itertools.pairwise(offsets)]
        self._numbers: npt.NDArray[np.float32] = self._partial.numpy()
        self._kind = (tensors[0].device, tensors[0].dtype) if tensors else None
        self._zeros: bytes = b""

    def __call__(self, tensors: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Norms in the order of the tensors, float32, shape (number of tensors,).

        Raises:
            TypeError: The tensors were moved or cast since they were planned for.
            RuntimeError: They have another shape or layout now.
        """
        norms = self._measure(tensors)
        if np.maximum.reduce(norms, initial=0.0) < np.inf and np.minimum.reduce(norms, initial=1.0) >= TINY:
            return norms.astype(np.float32)
        with np.errstate(over="ignore"):
            return self._second_look(norms, tensors).astype(np.float32)

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

    def _measure(self, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> npt.NDArray[np.float64]:
        if tensors and (tensors[0].device, tensors[0].dtype) != self._kind:
            raise TypeError("the tensors were moved or cast")
        if dtype is torch.float32:
            numbers, outs = self._numbers, self._outs
        else:
            partial = torch.empty(len(self._partial), dtype=dtype)
            numbers, outs = partial.numpy(), list(partial.split([len(out) for out in self._outs]))
        part = 0
        for slab in self._slabs:
            torch.linalg.vector_norm(slab.fill(tensors), 2, 1, dtype=dtype, out=outs[part])
            part += 1
        for place, row in self._rows:
            torch.linalg.vector_norm(tensors[place].view(-1, row), 2, 1, dtype=dtype, out=outs[part])
            part += 1
        norms = np.zeros(len(tensors))
        if part:
            norms[self._places] = np.sqrt(np.add.reduceat(np.square(numbers, dtype=np.float64), self._starts))
        for i in self._others:
            norms[i] = _norm(tensors[i], dtype)
        return norms


def values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as real, dense and fit for arithmetic: duplicates of a sparse gradient are summed."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    if is_float8(tensor):
        tensor = tensor.float()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def is_float8(tensor: Tensor) -> bool:
    """Whether the numbers have a type that torch stores and converts but does no arithmetic with."""
    return tensor.dtype.itemsize == 1 and tensor.is_floating_point()


def flat(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as a vector in the order of memory, so that nothing is copied where it can be avoided."""
    tensor = values(tensor)
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _row_length(tensor: Tensor) -> int:
    """The largest divisor of a large tensor's size that is at most `LINE`; 0 where it cannot be cut like that."""
    size, dtype = tensor.numel(), tensor.dtype
    is_plain = tensor.layout is torch.strided and not tensor.is_complex() and dtype is not torch.float64
    if not (size and is_plain and tensor.is_contiguous()) or is_float8(tensor):
        return 0
    row = next(n for n in range(min(size, LINE), 0, -1) if size % n == 0)
    return row if row >= 64 else 0


def _norm(tensor: Tensor, dtype: torch.dtype) -> float:
    """The norm of any tensor, from those of its rows and of what is left over."""
    if tensor.dtype in (torch.float64, torch.complex128):
        dtype = torch.float64
    line = flat(tensor)
    whole = len(line) - len(line) % LINE
    rows = torch.linalg.vector_norm(line[:whole].view(-1, LINE), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(line[whole:], dtype=dtype)
    return math.hypot(float(torch.linalg.vector_norm(rows.double())), float(rest))
