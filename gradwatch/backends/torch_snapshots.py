"""The last good states of a training, to go back to: parameters, buffers and optimizer state."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.backends.room import require_room
from gradwatch.backends.torch_sharding import local


@dataclass
class Snapshot:
    """One state.

    Args:
        step: The first step that has not happened in it.
        tensors: Name to where the numbers are: a host tensor, or a file.
        numbers: Plain entries of the optimizers' states, by optimizer, parameter and name.
        ready: Waits until the copy is complete; None when it is.
    """

    step: int
    tensors: dict[str, Tensor | Path] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    ready: Callable[[], None] | None = None


class Snapshots:
    """A ring of the last snapshots.

    Args:
        model: Whose parameters and buffers.
        optimizers: Whose state; a list that may grow.
        keep: Snapshots kept.
        directory: Where they are written; None keeps them in host memory.

    Raises:
        ConfigurationError: There is no room for them.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], *, keep: int, directory: Path | None = None
    ) -> None:
        self._model, self._optimizers = model, optimizers
        self._ring: deque[Snapshot] = deque(maxlen=keep)
        require_room(keep, _size(model, optimizers), directory)
        self._directory = directory
        self._folder: Path | None = None
        self._streams: dict[torch.device, Any] = {}

    def __len__(self) -> int:
        return len(self._ring)

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Copy the state as it is before `step`; on CUDA aside of the work in progress."""
        if self._ring and len(self._ring) == self._ring.maxlen:
            self._drop(self._ring.popleft())
        self._ring.append(self._written(self._copied(step)))

    @torch.no_grad()
    def restore(self, until_step: int, *, backs: int = 0) -> int:
        """Go back to the newest snapshot taken before `until_step`, or `backs` further; later ones are forgotten.

        Returns:
            The step before which it was taken.

        Raises:
            LookupError: There is none.
        """
        if not self._ring:
            raise LookupError("no snapshot was taken before the run fell sick")
        good = sum(snapshot.step <= until_step for snapshot in self._ring)
        place = max(0, good - 1 - backs)
        while len(self._ring) > place + 1:
            self._drop(self._ring.pop())
        self._put_back(self._ring[place])
        return self._ring[place].step

    def clear(self) -> None:
        """Forget all snapshots: they are of another network, or of weights that were given up."""
        while self._ring:
            self._drop(self._ring.pop())

    def close(self) -> None:
        """Delete what is on disk."""
        self.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _copied(self, step: int) -> Snapshot:
        snapshot = Snapshot(step)
        events = []
        with self._aside() as streams:
            for name, tensor in self._tensors():
                snapshot.tensors[name] = _on_host(tensor)
            events = [stream.record_event() for stream in streams]
        for number, optimizer in enumerate(self._optimizers):
            snapshot.numbers[str(number)] = [
                {key: value for key, value in optimizer.state.get(p, {}).items() if not isinstance(value, Tensor)}
                if p in optimizer.state
                else None
                for p in _held(optimizer)
            ]
        snapshot.ready = lambda: _wait(events)
        return snapshot

    @contextlib.contextmanager
    def _aside(self) -> Iterator[list[Any]]:
        """Copies run on a side stream of each device; the main stream waits for them there, and the host does not."""
        devices = {p.device for p in self._model.parameters() if p.device.type == "cuda"}
        if not devices:
            yield []
            return
        with contextlib.ExitStack() as stack:
            for device in devices:
                stream = self._streams.setdefault(device, torch.cuda.Stream(device))
                stream.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(stream))
            yield [self._streams[device] for device in devices]
        for device in devices:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield f"parameter/{name}", local([parameter])[0].detach()
        for name, tensor in self._model.named_buffers():
            yield f"buffer/{name}", local([tensor])[0]
        for number, optimizer in enumerate(self._optimizers):
            for place, parameter in enumerate(_held(optimizer)):
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield f"state/{number}/{place}/{key}", local([value])[0]

    def _written(self, snapshot: Snapshot) -> Snapshot:
        if self._directory is None:
            return snapshot
        if self._folder is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="snapshots-", dir=self._directory))
        if snapshot.ready is not None:
            snapshot.ready()
        for number, (name, tensor) in enumerate(list(snapshot.tensors.items())):
            assert isinstance(tensor, Tensor)
            path = self._folder / f"{snapshot.step}-{number}.bin"
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
            snapshot.tensors[name] = path
        return snapshot

    def _put_back(self, snapshot: Snapshot) -> None:
        if snapshot.ready is not None:
            snapshot.ready()
        present = dict(self._tensors())
        for name, tensor in present.items():
            if name in snapshot.tensors:
                tensor.copy_(_read(snapshot.tensors[name], tensor))
        for number, optimizer in enumerate(self._optimizers):
            entries = snapshot.numbers.get(str(number), [])
            for place, parameter in enumerate(_held(optimizer)):
                entry = entries[place] if place < len(entries) else None
                if entry is None:
                    optimizer.state.pop(parameter, None)
                else:
                    optimizer.state[parameter].update(entry)

    def _drop(self, snapshot: Snapshot) -> None:
        for place in snapshot.tensors.values():
            if isinstance(place, Path):
                place.unlink(missing_ok=True)


def _wait(events: Sequence[Any]) -> None:
    for event in events:
        event.synchronize()


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cuda":
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    return tensor.detach().to("cpu", copy=True)


def _read(place: Tensor | Path, like: Tensor) -> Tensor:
    if isinstance(place, Tensor):
        return place
    raw = torch.from_numpy(np.fromfile(place, np.uint8))
    return raw.view(like.dtype).view(like.shape)


def _size(model: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Bytes of one snapshot; an optimizer that has not stepped yet is taken to hold two numbers for each parameter."""
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for optimizer in optimizers:
        held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        weights += sum(v.nbytes for v in held) if held else 2 * sum(p.nbytes for p in _held(optimizer))
    return weights
