"""Numbers that stay on an accelerator: norms, functions for the in-step actions, copies that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradwatch.backends.torch_norms import values
from gradwatch.records import NOT_MEASURED

#: Types of device whose numbers the host reads without waiting; tests empty it to send CPU tensors the other way.
HOST: tuple[str, ...] = ("cpu",)


def on_host(tensor: Tensor) -> bool:
    """Whether the host reads the numbers of this tensor without waiting."""
    return tensor.device.type in HOST


def is_capturing() -> bool:
    """Whether the work of this thread is being recorded into a CUDA graph, in which no host may wait or allocate."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def beside(value: Any, other: Any) -> Any:
    """A tensor on the device of another one, without waiting; anything else as it is."""
    if isinstance(value, Tensor) and isinstance(other, Tensor) and value.device != other.device:
        return value.to(other.device, non_blocking=True)
    return value


class DeviceNorms:
    """L2 norms of a fixed list of tensors, left on the device of the first; planned once.

    Args:
        tensors: Examples of the tensors to come.
        places: Where they stand among the columns; None when they are all of them.
        count: Number p of columns.
    """

    def __init__(self, tensors: Sequence[Tensor], places: Sequence[int] | None, count: int) -> None:
        self._home = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
        by_device: dict[torch.device, list[int]] = {}
        for i, tensor in enumerate(tensors):
            by_device.setdefault(tensor.device, []).append(i)
        self._groups = list(by_device.values())
        order = np.array([i for group in self._groups for i in group], np.intp)
        columns = order if places is None else np.array(places, np.intp)[order]
        is_whole = len(columns) == count and bool((np.diff(columns) > 0).all())
        self._columns = None if is_whole else torch.as_tensor(columns).to(self._home)
        self._count = count

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Norms of shape (p,), float32; `NOT_MEASURED` where there is no tensor."""
        parts = [
            _foreach_norms([tensors[i] for i in group]).to(self._home, non_blocking=True) for group in self._groups
        ]
        norms = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._columns is None:
            return norms
        return torch.full((self._count,), NOT_MEASURED, device=self._home).index_copy_(0, self._columns, norms)


def _foreach_norms(tensors: Sequence[Tensor]) -> Tensor:
    dense = [values(tensor) for tensor in tensors]
    norms: list[Tensor] = (
        list(torch._foreach_norm(dense, 2, dtype=torch.float32))
        if _same_kind(dense)
        else [
            torch.linalg.vector_norm(tensor, dtype=torch.float32 if tensor.dtype is not torch.float64 else None)
            for tensor in dense
        ]
    )
    return torch.stack([norm.float() for norm in norms])


def _same_kind(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.dtype is not torch.float64 for tensor in tensors)


class TorchNamespace:
    """The array functions that in-step actions use; one operand may be a number. None of them waits for the device."""

    isfinite = staticmethod(torch.isfinite)
    sqrt = staticmethod(torch.sqrt)
    sum = staticmethod(torch.sum)
    ones_like = staticmethod(torch.ones_like)
    reshape = staticmethod(torch.reshape)

    @staticmethod
    def concatenate(arrays: Any) -> Any:
        """One after the other."""
        return torch.cat(tuple(arrays))

    @staticmethod
    def sort(a: Any) -> Any:
        """The numbers, ascending."""
        return torch.sort(a).values

    @staticmethod
    def cumsum(a: Any) -> Any:
        """Running sum."""
        return torch.cumsum(a, 0)

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        """Elementwise minimum."""
        return _with_number(torch.minimum, "max", a, b)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        """Elementwise maximum."""
        return _with_number(torch.maximum, "min", a, b)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        """`a` where the condition holds, else `b`."""
        return torch.where(condition, a, b)


def _with_number(function: Any, bound: str, a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return function(a, b)
    return torch.clamp(a, **{bound: b}) if isinstance(a, Tensor) else torch.clamp(b, **{bound: a})


def host_or_copy(number: Any) -> Any:
    """A scalar as a float; one on an accelerator as a copy there, since it may change before anybody looks."""
    if number is None:
        return 1.0
    if isinstance(number, Tensor):
        return float(number) if on_host(number) else number.detach().clone()
    return float(number)


class Transfer:
    """Numbers on their way to the host. CUDA copies them on a stream of their own into pinned memory.

    Args:
        tensors: Of any shape and type, on any device; they arrive as float32, in this order.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        home = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        self._sizes = [tensor.numel() for tensor in tensors]
        parts = [t.detach().reshape(-1).to(device=home, dtype=torch.float32, non_blocking=True) for t in tensors]
        numbers = torch.cat(parts)
        self._event: Any = None
        if home.type == "cuda":
            self._numbers = self._copy_aside(numbers)
        else:
            # Other accelerators have no portable way to wait for one copy: theirs is made when the numbers are read.
            self._numbers = numbers

    def _copy_aside(self, numbers: Tensor) -> Tensor:
        stream = _side_stream(numbers.device)
        host = torch.empty(numbers.shape, dtype=torch.float32, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(numbers.device))
        with torch.cuda.stream(stream):
            host.copy_(numbers, non_blocking=True)
        numbers.record_stream(stream)
        self._event = stream.record_event()
        return host

    def arrived(self) -> list[npt.NDArray[np.float32]]:
        """The numbers, one flat array per tensor; waits for them where they are still under way."""
        if self._event is not None:
            self._event.synchronize()
        numbers = self._numbers.cpu().numpy()
        return np.split(numbers.copy(), np.cumsum(self._sizes)[:-1])


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
