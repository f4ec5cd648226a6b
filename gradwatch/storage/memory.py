"""Memory for large arrays that live as long as a segment is being sealed."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def room(dtype: type[np.generic], *shape: int) -> npt.NDArray[Any]:
    """An array of zeros outside the heap.

    All its memory goes back to the system at once. From the heap, the arrays of one seal would leave holes into which
    those of the next do not fit, and the process would grow with every seal.
    """
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(1, size) * np.dtype(dtype).itemsize), dtype, size).reshape(shape)
