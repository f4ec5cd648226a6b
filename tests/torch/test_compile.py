"""Compiled models: names as the user wrote them, and not one graph break or recompilation more than unwatched."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from gradwatch.actions import Clip
from tests.torch.loops import assert_norms, assert_same, data, mlp, mse, reference, state_of, watching

# The compiler warns about itself.
pytestmark = pytest.mark.filterwarnings("ignore")

Train = Callable[[Any, torch.optim.Optimizer], list[list[float]]]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if tqdm := sys.modules.get("tqdm"):
        monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # the compiler's progress bars leave a thread behind
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _train(model: Any, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    norms = []
    for i, (x, y) in enumerate(data(8)):
        optimizer.zero_grad()
        mse(model, x, y).backward()
        norms.append(reference(model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if i == 4:
            model.eval()
            with torch.no_grad():
                mse(model, x, y)
            model.train()
    return norms


def _counters() -> dict[str, Any]:
    """What was compiled, and how often a graph broke; a second compilation of the same frame counts again."""
    found = torch._dynamo.utils.counters
    return {kind: dict(found[kind]) for kind in ("stats", "frames", "graph_break", "unimplemented")}


def _both(run_dir: Path, train: Train, wrap: Callable[[nn.Module], Any]) -> tuple[Any, list[list[float]]]:
    """Train unwatched and watched; all that is left and what the compiler counted must be the same."""
    results = []
    for is_watched in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        inner = mlp()
        model = wrap(inner)
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
        if is_watched:
            with watching(run_dir, model, optimizer) as (_, record):
                norms = train(model, optimizer)
        else:
            train(model, optimizer)
        results.append((state_of(inner, optimizer), _counters()))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1]["stats"]["unique_graphs"] >= 1
    return record, norms


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_recorded_under_its_own_names(run_dir: Path, backend: str) -> None:
    record, norms = _both(run_dir, _train, lambda model: torch.compile(model, backend=backend))
    assert_norms(record.norms, norms)
    assert record.names == [name for name, _ in mlp().named_parameters()]


class Net(nn.Module):
    """A forward pass that is not torch's own, which the compiler passes over."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def test_a_model_compiled_in_place(run_dir: Path) -> None:
    def compiled(model: nn.Module) -> nn.Module:
        net = Net(model)
        net.compile(backend="aot_eager")
        return net

    record, norms = _both(run_dir, _train, compiled)
    assert_norms(record.norms, norms)


def test_a_part_that_is_compiled(run_dir: Path) -> None:
    def partly(model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        compiled: Any = torch.compile(model[2], backend="aot_eager")
        model[2] = compiled
        return model

    record, norms = _both(run_dir, _train, partly)
    assert_norms(record.norms, norms)
    assert record.names == [name for name, _ in mlp().named_parameters()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_a_model_compiled_by_inductor(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # none that stay behind
    record, norms = _both(run_dir, _train, torch.compile)
    assert_norms(record.norms, norms)


def test_an_optimizer_step_that_is_compiled(run_dir: Path) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
        step = torch.compile(optimizer.step, backend="eager")
        norms = []
        for x, y in data(6):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            norms.append(reference(model.parameters()))
            step()
        return norms

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer) as (_, record):
        norms = train(model, optimizer)
    other = mlp()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert_norms(record.norms, norms)
    assert_same([*model.parameters()], [*other.parameters()])


@pytest.mark.parametrize("lr", ["a number", "a tensor"])
def test_actions_reach_an_optimizer_step_that_is_compiled(run_dir: Path, lr: str) -> None:
    def rate() -> Any:
        return torch.tensor(0.01) if lr == "a tensor" else 0.01

    model, other = mlp(), mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate(), capturable=True)
    of_other = torch.optim.Adam(other.parameters(), lr=rate())
    step = torch.compile(optimizer.step, backend="eager")
    with watching(run_dir, model, optimizer, actions=[Clip(max_norm=0.1)]) as (watcher, record):
        for i, (x, y) in enumerate(data(8)):
            if i == 4:
                watcher._policy.state.lr_factor = 0.5  # as DecayLR has it
                of_other.param_groups[0]["lr"] = rate() * 0.5
            for net in (model, other):
                net.zero_grad()
                mse(net, x, y).backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            step()
            of_other.step()
    for one, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-5, atol=1e-6)
    assert (record.metric("clip_coefficient") < 1).all()
    np.testing.assert_allclose(record.metric("lr"), 0.01, rtol=1e-6)


def test_clip_works_on_a_compiled_model(run_dir: Path) -> None:
    model, other = mlp(), mlp()
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    of_other = torch.optim.SGD(other.parameters(), lr=0.1)
    with watching(run_dir, compiled, optimizer, actions=[Clip(max_norm=0.1)]):
        for x, y in data(5):
            optimizer.zero_grad()
            mse(compiled, x, y).backward()
            optimizer.step()
            of_other.zero_grad()
            mse(other, x, y).backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            of_other.step()
    for one, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-5, atol=1e-6)


def test_a_loss_module_inside_a_compiled_function_breaks_no_graph(run_dir: Path) -> None:
    model, loss_fn = mlp(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forward = torch.compile(lambda x, y: loss_fn(model(x), y), backend="eager", fullgraph=True)
    with watching(run_dir, model, optimizer, loss_fn=loss_fn) as (_, record):
        for x, y in data(3):
            optimizer.zero_grad()
            forward(x, y).backward()
            optimizer.step()
    assert len(record) == 3
