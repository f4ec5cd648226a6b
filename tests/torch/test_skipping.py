"""`SkipStep` leaves exactly the state of a run without the poisoned batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch.actions import SkipStep
from gradwatch.records import SKIP_REASONS
from tests.torch.loops import assert_same, data, mlp, mse, state_of, watching

BAD = (0, 5, 6)
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


def _train(optimizer: torch.optim.Optimizer, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = mse(model, x, y)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_poisoned_batch_leaves_no_trace(run_dir: Path, name: str) -> None:
    batches = data(12)
    poisoned = [(x * float("nan") if i in BAD else x, y) for i, (x, y) in enumerate(batches)]
    clean, watched = mlp(inplace=False), mlp(inplace=False)
    of_clean, of_watched = OPTIMIZERS[name](clean.parameters()), OPTIMIZERS[name](watched.parameters())

    _train(of_clean, clean, [batch for i, batch in enumerate(batches) if i not in BAD])
    with watching(run_dir, watched, of_watched, actions=[SkipStep()]) as (_, record):
        _train(of_watched, watched, poisoned)

    assert_same(state_of(watched, of_watched), state_of(clean, of_clean))
    assert record.reasons == [SKIP_REASONS.index("nonfinite") if i in BAD else 0 for i in range(12)]
    assert record.metric("skipped").tolist() == [float(i in BAD) for i in range(12)]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("is_scaled", [True, False], ids=["GradScaler", "bfloat16"])
def test_a_poisoned_batch_leaves_no_trace_in_mixed_precision(run_dir: Path, fused: bool, is_scaled: bool) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=3, enabled=is_scaled)
        for x, y in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=not is_scaled):
                loss = mse(model, x, y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    batches = data(12)
    poisoned = [(x * float("inf") if i in BAD else x, y) for i, (x, y) in enumerate(batches)]
    clean, watched = mlp(inplace=False), mlp(inplace=False)
    of_clean, of_watched = (torch.optim.Adam(m.parameters(), lr=1e-2, fused=fused) for m in (clean, watched))

    train(clean, of_clean, [batch for i, batch in enumerate(batches) if i not in BAD])
    with watching(run_dir, watched, of_watched, actions=[SkipStep()]) as (_, record):
        train(watched, of_watched, poisoned)

    assert_same(state_of(watched, of_watched), state_of(clean, of_clean))
    assert record.metric("skipped").tolist() == [float(i in BAD) for i in range(12)]


def test_a_spike_is_skipped_after_the_warm_up(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(run_dir, model, optimizer, actions=[SkipStep(factor=10.0, warmup=5)]) as (_, record):
        for i, (x, y) in enumerate(data(12)):
            optimizer.zero_grad()
            (mse(model, x, y) * (1000.0 if i in (2, 9) else 1.0)).backward()
            optimizer.step()
    assert [i for i, reason in enumerate(record.reasons) if reason] == [9]
    assert record.reasons[9] == SKIP_REASONS.index("spike")


def test_the_gradients_are_given_back_after_a_skipped_step(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(run_dir, model, optimizer, actions=[SkipStep()]):
        (mse(model, *data(1)[0]) * float("nan")).backward()
        grads = [p.grad for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def test_a_dry_run_takes_the_step_and_says_that_it_would_be_skipped(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(run_dir, model, optimizer, actions=[SkipStep()], dry_run=True) as (_, record):
        (mse(model, *data(1)[0]) * float("nan")).backward()
        optimizer.step()
    assert record.metric("would_skip").tolist() == [1.0]
    assert record.metric("skipped").tolist() == [0.0]
    assert torch.isnan(next(model.parameters())).all()


def test_what_an_action_has_learnt_goes_through_a_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    def train(watcher_dir: Path, batches: list[int], state: Any = None) -> tuple[list[int], Any]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with watching(watcher_dir, model, optimizer, actions=[SkipStep(factor=10.0, warmup=5)]) as (watcher, record):
            if state is not None:
                watcher.load_state_dict(state)
            for i in batches:
                optimizer.zero_grad()
                (mse(model, *data(1)[0]) * (1000.0 if i == 9 else 1.0)).backward()
                optimizer.step()
            saved = watcher.state_dict()
        return record.reasons, saved

    _, saved = train(run_dir, list(range(8)))
    reasons, _ = train(tmp_path / "resumed", [8, 9], saved)
    assert reasons == [0, SKIP_REASONS.index("spike")]
