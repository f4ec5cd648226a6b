"""Law 9: after `close()`, or when a watcher is dropped, nothing is left on model, optimizer or process."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad

from gradwatch.errors import WatcherClosedError
from gradwatch.integrations.torch_watch import watch_torch
from tests.conftest import global_hooks, wrapped_functions
from tests.torch.loops import data, mlp, mse, watching


def _hooks(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module) -> int:
    on_parameters = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    on_optimizer = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    on_modules = sum(len(m._forward_hooks) + len(m._backward_hooks) for m in [*model.modules(), loss_fn])
    return on_parameters + on_optimizer + on_modules


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_close_takes_all_hooks_away(run_dir: Path, steps: int) -> None:
    model, loss_fn = mlp(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer, loss_fn=loss_fn):
        assert _hooks(model, optimizer, loss_fn) > 0
        for x, y in data(steps):
            loss_fn(model(x), y).backward()
            optimizer.step()
    assert _hooks(model, optimizer, loss_fn) == 0
    assert wrapped_functions() == []


def test_after_the_first_step_only_the_ends_of_backward_carry_hooks(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer):
        for x, y in data(3):
            mse(model, x, y).backward()
            optimizer.step()
        assert sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()) == 2


def test_no_module_carries_a_hook(run_dir: Path) -> None:
    model = mlp()
    with watching(run_dir, model, torch.optim.SGD(model.parameters(), lr=0.1)):
        assert all(not m._forward_hooks and not m._backward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_taps_stay_until_the_last_watcher_leaves(run_dir: Path, tmp_path: Path) -> None:
    original = clip_grad._clip_grads_with_norm_
    one, other = mlp(), mlp()
    first = watch_torch(one, torch.optim.SGD(one.parameters()), run_dir=run_dir)
    second = watch_torch(other, torch.optim.SGD(other.parameters()), run_dir=tmp_path / "other")
    first.close()
    assert clip_grad._clip_grads_with_norm_ is not original
    second.close()
    assert clip_grad._clip_grads_with_norm_ is original


@pytest.mark.parametrize("is_given", [True, False])
def test_a_watcher_dropped_with_its_model_leaves_nothing(run_dir: Path, is_given: bool) -> None:
    def train() -> weakref.ref[nn.Module]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watcher = watch_torch(model, optimizer if is_given else None, run_dir=run_dir)
        for x, y in data(3):
            mse(model, x, y).backward()
            optimizer.step()
        watcher.log(done=1)
        return weakref.ref(model)

    model = train()
    gc.collect()
    assert model() is None
    assert wrapped_functions() == []
    assert global_hooks() == []


def test_a_watcher_that_nobody_keeps_goes_on_as_long_as_its_optimizer(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = weakref.ref(watch_torch(model, optimizer, run_dir=run_dir))
    gc.collect()
    mse(model, *data(1)[0]).backward()
    optimizer.step()
    alive = watcher()
    assert alive is not None
    alive.close()


def test_gradients_are_not_kept_alive_after_the_step(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer):
        for x, y in data(2):
            mse(model, x, y).backward()
            gone = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
            gc.collect()
            assert [ref() for ref in gone] == [None] * 6


def test_a_closed_watcher_refuses_numbers(run_dir: Path) -> None:
    model = mlp()
    with watching(run_dir, model, torch.optim.SGD(model.parameters(), lr=0.1)) as (watcher, _):
        pass
    with pytest.raises(WatcherClosedError, match="is closed"):
        watcher.log(loss=1.0)


def test_an_error_in_the_loop_is_the_status_of_the_run(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(RuntimeError, match="mine"),
        watch_torch(model, optimizer, run_dir=run_dir),
    ):
        raise RuntimeError("mine")
    assert '"crashed"' in (run_dir / "run.json").read_text()
