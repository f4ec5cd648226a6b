"""Training loops, networks and a listener for the tests of the PyTorch side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.actions import AGC, Action, AutoClip, Clip, SkipStep, ZClip
from gradwatch.actions.base import InStepAction
from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.records import NOT_MEASURED, ActionRecord, Finding, StepBatch

#: Sets of actions that work within the step, each of which must leave it without a wait.
IN_STEP: list[list[Action]] = [
    [],
    [Clip(max_norm=0.05)],
    [Clip(per_layer=0.05), Clip(value=0.01)],
    [ZClip()],
    [AutoClip()],
    [AGC()],
    [SkipStep(), Clip(max_norm=0.05)],
]


class Recorder:
    """A sink that keeps all batches."""

    def __init__(self) -> None:
        self.batches: list[StepBatch] = []

    def open(self, *_: Any, **__: Any) -> None: ...
    def steps(self, batch: StepBatch) -> None:
        self.batches.append(batch)

    def finding(self, finding: Finding) -> None: ...
    def action(self, record: ActionRecord) -> None: ...
    def close(self, status: str, detail: str) -> None: ...

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    @property
    def names(self) -> list[str]:
        return [parameter.name for parameter in self.batches[-1].parameters]

    @property
    def norms(self) -> npt.NDArray[np.float32]:
        """All norms, shape (steps, parameters at the end)."""
        width = len(self.batches[-1].parameters)
        rows = [row for batch in self.batches for row in batch.grad_norm]
        return np.stack([np.pad(row, (0, width - len(row)), constant_values=NOT_MEASURED) for row in rows])

    def metric(self, name: str) -> npt.NDArray[np.float64]:
        return np.concatenate([batch.metric(name) for batch in self.batches])

    @property
    def stages(self) -> list[int]:
        return [int(stage) for batch in self.batches for stage in batch.stage]

    @property
    def reasons(self) -> list[int]:
        return [int(reason) for batch in self.batches for reason in batch.skip_reason]

    def samples(self, name: str) -> dict[int, npt.NDArray[np.float32]]:
        """Step to row of a sampled statistic."""
        found: dict[int, npt.NDArray[np.float32]] = {}
        for batch in self.batches:
            if name in batch.statistics:
                samples = batch.statistics[name]
                found.update(zip(batch.step[samples.rows].tolist(), samples.values, strict=True))
        return found


@contextmanager
def watching(
    run_dir: Path, model: Any, optimizer: Any = None, **settings: Any
) -> Iterator[tuple[TorchWatcher, Recorder]]:
    """A watcher and what it records; fails when a part of the watcher failed."""
    recorder = Recorder()
    settings.setdefault("detectors", [])
    sinks = [recorder, *settings.pop("sinks", [])]
    watcher = watch_torch(model, optimizer, run_dir=run_dir, sinks=sinks, overwrite=True, **settings)
    try:
        yield watcher, recorder
    finally:
        watcher.close()
    assert watcher.faults.messages == {}


def mlp(*, width: int = 16, seed: int = 0, inplace: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(inplace=inplace), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    )


def data(steps: int, *, size: int = 12, width: int = 8, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, width, generator=generator), torch.randn(size, 4, generator=generator)) for _ in range(steps)
    ]


def mse(model: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def reference(parameters: Iterable[Tensor]) -> list[float]:
    """Norms of the gradients in float64, `NOT_MEASURED` without."""
    found = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            found.append(NOT_MEASURED)
            continue
        dense = grad.to_dense() if grad.layout is not torch.strided else grad
        dense = torch.view_as_real(dense) if dense.is_complex() else dense
        found.append(float(dense.double().norm()))
    return found


def assert_norms(recorded: Any, expected: Any, *, tolerance: float = 1e-6) -> None:
    """Every norm to the tolerance, and the unmeasured ones in the same places."""
    recorded, expected = np.asarray(recorded, np.float64), np.asarray(expected, np.float64)
    assert recorded.shape == expected.shape
    absent = expected == NOT_MEASURED
    assert ((recorded == NOT_MEASURED) == absent).all()
    np.testing.assert_allclose(recorded[~absent], expected[~absent], rtol=tolerance, atol=1e-30)


def state_of(model: nn.Module, *optimizers: Optimizer) -> list[Any]:
    """Parameters, buffers, optimizer state and random state, to be compared bit by bit."""
    return [
        copy.deepcopy(model.state_dict()),
        [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers],
        torch.get_rng_state(),
    ]


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Equal to the last bit, NaN in the same places."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor), path
        assert one.dtype == other.dtype, path
        assert one.shape == other.shape, path
        assert (
            torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0))
            if one.is_floating_point()
            else torch.equal(one, other)
        ), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert one == other, path


Loop = Callable[[Callable[..., Any]], list[Any]]
InStepActions = list[InStepAction]
