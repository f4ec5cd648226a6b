"""The path of accelerators: nothing is waited for, and the record is the same.

Without an accelerator CPU tensors are sent that way. The tests marked `cuda` run on a GPU under
`torch.cuda.set_sync_debug_mode("error")`, which turns every hidden wait into an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.actions import Clip, DecayLR, Rollback, SkipStep
from gradwatch.backends import torch_device
from gradwatch.backends.torch_exchange import Exchange
from gradwatch.integrations import torch as integration
from gradwatch.integrations import torch_guard
from gradwatch.records import SKIP_REASONS
from tests.torch.loops import (
    IN_STEP,
    Recorder,
    assert_norms,
    assert_same,
    data,
    mlp,
    mse,
    reference,
    state_of,
    watching,
)
from tests.torch.waits import Waits


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_device, "HOST", ())


def _train(run_dir: Path, make: Any, *, scaler: bool = False, clip: bool = False, **settings: Any) -> Any:
    """Train 14 steps; the record, the true norms, and all that is left."""
    model = mlp(inplace=False)
    optimizer = make(model.parameters())
    scale = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaler)
    expected = []
    with watching(run_dir, model, optimizer, stats_every=5, **settings) as (watcher, record):
        for x, y in data(14):
            optimizer.zero_grad()
            loss = mse(model, x, y)
            scale.scale(loss).backward()
            expected.append([norm / (scale.get_scale() if scaler else 1.0) for norm in reference(model.parameters())])
            scale.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model[:3].parameters(), 0.05)
            scale.step(optimizer)
            scale.update()
            watcher.log(loss=loss)
    return record, expected, state_of(model, optimizer)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=torch.tensor(0.1), momentum=0.9)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("scaler", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_the_record_is_that_of_the_host(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: bool, scaler: bool
) -> None:
    record, expected, left = _train(run_dir, _sgd, clip=clip, scaler=scaler)
    monkeypatch.setattr(torch_device, "HOST", ("cpu",))
    other, _, other_left = _train(tmp_path / "host", _sgd, clip=clip, scaler=scaler)
    assert_norms(record.norms, expected, tolerance=1e-5)
    assert_same(left, other_left)
    for name in ("loss", "lr", "global_norm", "clip_coefficient", "skipped"):
        np.testing.assert_allclose(record.metric(name), other.metric(name), rtol=1e-5, err_msg=name)
    for name in ("weight_norm", "update_ratio", "grad_max", "zero_fraction", "nonfinite_count"):
        found, wanted = record.samples(name), other.samples(name)
        assert found.keys() == wanted.keys() == {0, 5, 10}
        for step, row in found.items():
            np.testing.assert_allclose(row, wanted[step], rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("action", [Clip(max_norm=0.05), Clip(per_layer=0.03), Clip(value=0.004)], ids=str)
def test_actions_do_the_same(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Clip) -> None:
    record, _, (model, _, _) = _train(run_dir, _sgd, actions=[action])
    monkeypatch.setattr(torch_device, "HOST", ("cpu",))
    other, _, (wanted, _, _) = _train(tmp_path / "host", _sgd, actions=[action])
    for name in model:
        torch.testing.assert_close(model[name], wanted[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(record.metric("clip_coefficient"), other.metric("clip_coefficient"), rtol=1e-4)


def _poisoned(run_dir: Path, make: Any, bad: tuple[int, ...]) -> tuple[Recorder, list[Any]]:
    model = mlp(inplace=False)
    optimizer = make(model.parameters())
    with watching(run_dir, model, optimizer, actions=[SkipStep(), Clip(max_norm=0.1)]) as (_, record):
        for i, (x, y) in enumerate(data(10)):
            optimizer.zero_grad()
            mse(model, x * float("nan") if i in bad else x, y).backward()
            optimizer.step()
    return record, state_of(model, optimizer)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("make", [_adamw, _sgd], ids=["fused, told on the device", "unfused, waited for"])
def test_a_poisoned_batch_is_skipped(run_dir: Path, make: Any) -> None:
    record, (model, _, _) = _poisoned(run_dir, make, bad=(0, 4))
    assert record.reasons == [SKIP_REASONS.index("nonfinite") if i in (0, 4) else 0 for i in range(10)]
    assert all(torch.isfinite(weights).all() for weights in model.values())


@pytest.mark.usefixtures("deferred")
def test_a_step_skipped_on_the_device_leaves_the_state_as_it_was(run_dir: Path) -> None:
    model = mlp(inplace=False)
    optimizer = _adamw(model.parameters())
    with watching(run_dir, model, optimizer, actions=[SkipStep()]):
        for i, (x, y) in enumerate(data(4)):
            optimizer.zero_grad()
            mse(model, x * (float("nan") if i == 3 else 1.0), y).backward()
            before = state_of(model, optimizer)
            optimizer.step()
        assert_same(state_of(model, optimizer), before)
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.usefixtures("deferred")
def test_rows_are_recorded_a_fixed_number_of_steps_later(run_dir: Path) -> None:
    model = mlp()
    optimizer = _sgd(model.parameters())
    recorded = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(8):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.step()
            recorded.append(len(record))
    lag = integration.LAG + 1  # and the row of the step that was just taken is still open
    assert recorded == [max(0, i + 1 - lag) for i in range(8)]
    assert len(record) == 8


@pytest.mark.usefixtures("deferred")
def test_parameters_without_gradient_and_two_optimizers(run_dir: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4), "unused": nn.Linear(2, 2)})
    optimizers = [torch.optim.SGD(model[name].parameters(), lr=0.1) for name in ("b", "a")]
    optimizers[0].add_param_group({"params": model["unused"].parameters()})
    expected = []
    with watching(run_dir, model, optimizers) as (_, record):
        for x, y in data(5):
            model.zero_grad()
            mse(model["a"], x, y).backward()
            mse(model["b"], x, y).backward()
            expected.append(reference(model.parameters()))
            for optimizer in optimizers:
                optimizer.step()
    assert_norms(record.norms, expected, tolerance=1e-5)


def test_nothing_is_done_while_a_cuda_graph_is_captured(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capturing = [False]
    monkeypatch.setattr(torch_guard, "is_capturing", lambda: capturing[0])
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    expected = []
    with watching(run_dir, model, optimizer, actions=[SkipStep(), Clip(max_norm=0.1)]) as (watcher, record):
        for i, (x, y) in enumerate(data(8)):
            capturing[0] = i in (3, 4)
            optimizer.zero_grad()
            mse(model, x, y).backward()
            if not capturing[0]:
                expected.append(reference(model.parameters()))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert watcher.faults.counts == {}
    assert_norms(record.norms, expected)
    assert caplog.text.count("captured into a CUDA graph") == 1


ACTING = pytest.mark.parametrize("actions", [*IN_STEP, [Clip(max_norm=0.05), DecayLR()], [Rollback(every=10)]], ids=str)


@pytest.mark.usefixtures("deferred")
@ACTING
def test_no_operation_reads_a_number_on_the_host(run_dir: Path, actions: list[Any]) -> None:
    model = mlp(inplace=False)
    optimizer = _adamw(model.parameters())
    settings = {"actions": actions, "stats_every": 3, "activations": True}
    with watching(run_dir, model, optimizer, **settings) as (watcher, record), Waits() as waits:
        for x, y in data(10):
            optimizer.zero_grad()
            loss = mse(model, x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model[:3].parameters(), 1.0)
            optimizer.step()
            watcher.log(loss=loss)
    assert waits.names == []
    assert len(record) == 10


@pytest.mark.usefixtures("deferred")
def test_an_operation_that_reads_a_number_on_the_host_would_be_noticed(run_dir: Path) -> None:
    model = mlp(inplace=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # cannot be told on the device to skip
    x, y = data(1)[0]
    with watching(run_dir, model, optimizer, actions=[SkipStep()]), Waits() as waits:
        mse(model, x, y).backward()
        optimizer.step()
    assert waits.names != []


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the GPU is an error."""
    torch.cuda.synchronize()
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("make", ["sgd", "adamw fused"])
@ACTING
def test_the_host_never_waits_for_the_gpu(run_dir: Path, make: str, actions: list[Any]) -> None:
    if make == "sgd" and any(action.name == "SkipStep" for action in actions):
        pytest.skip("an optimizer that is not fused has to be waited for; the documentation says so")
    model = mlp().cuda()
    fused = make == "adamw fused"
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True) if fused else torch.optim.SGD(model.parameters())
    )
    batches = [(x.cuda(), y.cuda()) for x, y in data(30)]
    expected = []
    with watching(run_dir, model, optimizer, actions=actions, stats_every=7) as (watcher, record):
        for i, (x, y) in enumerate(batches):
            if i == 9:  # the first steps plan, and copy indices once
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            loss = mse(model, x, y)
            loss.backward()
            expected.append([p.grad.double().norm() for p in model.parameters() if p.grad is not None])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            watcher.log(loss=loss)
        torch.cuda.set_sync_debug_mode("default")
    assert_norms(record.norms, [[float(norm) for norm in row] for row in expected])
    assert np.isfinite(record.metric("loss")).all()


@pytest.mark.cuda
def test_training_on_the_gpu_is_bit_identical(run_dir: Path) -> None:
    def train(*, watched: bool) -> list[Any]:
        model = mlp().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cuda")

        def loop() -> None:
            for x, y in data(30):
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.float16):
                    loss = mse(model, x.cuda(), y.cuda())
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        if watched:
            with watching(run_dir, model, optimizer, detectors="default"):
                loop()
        else:
            loop()
        return [*state_of(model, optimizer), scaler.state_dict(), torch.cuda.get_rng_state()]

    assert_same(train(watched=False), train(watched=True))


@pytest.mark.cuda
def test_a_captured_step_trains_as_unwatched_and_its_replays_are_passed_over(run_dir: Path) -> None:
    def train(*, watched: bool) -> list[Any]:
        model = mlp().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
        batches = [(x.cuda(), y.cuda()) for x, y in data(12)]
        x, y = (tensor.clone() for tensor in batches[0])

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            mse(model, x, y).backward()
            optimizer.step()

        def loop() -> None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for batch in batches:
                x.copy_(batch[0])
                y.copy_(batch[1])
                graph.replay()

        if watched:
            with watching(run_dir, model, optimizer) as (_, record):
                loop()
            assert len(record) == 3
        else:
            loop()
        return state_of(model, optimizer)

    assert_same(train(watched=False), train(watched=True))


@pytest.mark.cuda
def test_a_model_compiled_with_cuda_graphs_is_recorded(run_dir: Path) -> None:
    model = mlp(inplace=False).cuda()
    compiled: Any = torch.compile(model, mode="reduce-overhead")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    expected = []
    with watching(run_dir, compiled, optimizer, actions=[Clip(max_norm=0.05)]) as (_, record):
        for x, y in data(12):
            optimizer.zero_grad()
            mse(compiled, x.cuda(), y.cuda()).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected, tolerance=1e-5)


@pytest.mark.cuda
def test_a_rollback_restores_what_was_copied_aside(run_dir: Path) -> None:
    model = mlp(inplace=False).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    actions = [Rollback(every=2, on="nonfinite")]
    with watching(run_dir, model, optimizer, actions=actions, detectors="default") as _:
        for i, (x, y) in enumerate(data(20)):
            optimizer.zero_grad()
            mse(model, x.cuda() * (float("nan") if i == 9 else 1.0), y.cuda()).backward()
            optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.cuda
def test_a_model_on_two_devices_is_recorded_and_clipped_as_on_one(run_dir: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    model, other = mlp(inplace=False), mlp(inplace=False)
    first, last = model[:3].cuda(0), model[3:].cuda(1)
    optimizer = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=0.1)
    of_other = torch.optim.SGD(other.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer, actions=[Clip(max_norm=0.05)], stats_every=3) as (_, record):
        for x, y in data(9):
            optimizer.zero_grad()
            (last(first(x.cuda(0)).cuda(1)) - y.cuda(1)).square().mean().backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
            of_other.zero_grad()
            mse(other, x, y).backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.05)
            of_other.step()
    assert_norms(record.norms, expected, tolerance=1e-5)
    for one, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.usefixtures("no_waiting")
def test_sums_over_ranks_are_made_on_the_gpu() -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        exchange = Exchange(0, 1, {}, timeout=20.0, topic="gpu")
        numbers = torch.arange(5.0, device="cuda", dtype=torch.float64)
        exchange.add_up(numbers)  # the first one makes the communicator
        torch.cuda.set_sync_debug_mode("error")
        exchange.add_up(numbers)
        torch.cuda.set_sync_debug_mode("default")
        assert numbers.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        exchange.close()
    finally:
        torch.distributed.destroy_process_group()
