"""Law 2: whatever fails inside gradwatch, the training goes on as if nobody watched."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from gradwatch.actions import Clip, DecayLR
from gradwatch.actions.base import InStepAction, InStepDecision
from gradwatch.backends import torch_gradients, torch_statistics, torch_step
from gradwatch.integrations import torch as integration
from gradwatch.integrations.torch import TorchWatcher
from gradwatch.integrations.torch_pending import Pending
from gradwatch.integrations.torch_watch import watch_torch
from tests.torch.loops import assert_same, data, mlp, mse, state_of


def _boom(*_: Any, **__: Any) -> Any:
    raise ValueError("a bug of ours")


BUGS: dict[str, tuple[object, str]] = {
    "measuring": (torch_gradients.Gradients, "measure"),
    "planning": (torch_gradients, "CpuNorms"),
    "reading": (Pending, "read"),
    "forgetting": (Pending, "forget"),
    "clip tap": (TorchWatcher, "clipping"),
    "unscale tap": (TorchWatcher, "unscaling"),
    "rows": (TorchWatcher, "_close_open_row"),
    "statistics": (integration, "update_statistics"),
    "copying weights": (torch_statistics.Updates, "start"),
    "graph": (integration, "read_graph"),
    "undoing": (torch_step.ScaledLR, "undo"),
}


def _train(watch: bool, run_dir: Path, monkeypatch: pytest.MonkeyPatch, bug: str, *, at: int) -> list[Any]:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    watcher = watch_torch(model, optimizer, run_dir=run_dir, stats_every=2) if watch else None
    with monkeypatch.context() as patch:
        for i, (x, y) in enumerate(data(8)):
            if i == at and watch:
                patch.setattr(*BUGS[bug], _boom)
            optimizer.zero_grad()
            loss = mse(model, x, y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            if watcher:
                watcher.log(loss=loss)
        if watcher:
            watcher.close()
    return state_of(model, optimizer)


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_does_not_reach_the_training(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bug: str, at: int
) -> None:
    caplog.set_level(logging.CRITICAL, "gradwatch")
    plain = _train(False, run_dir, monkeypatch, bug, at=at)
    assert_same(plain, _train(True, run_dir, monkeypatch, bug, at=at))


def test_a_failed_part_is_named_once_and_counted(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_gradients.Gradients, "measure", _boom)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_torch(model, optimizer, run_dir=run_dir) as watcher:
        for x, y in data(3):
            mse(model, x, y).backward()
            optimizer.step()
    assert watcher.faults.messages == {"torch hooks": "ValueError: a bug of ours"}
    assert [record.message for record in caplog.records].count(
        "gradwatch: 'torch hooks' failed and is switched off; training goes on"
    ) == 1


class Broken(InStepAction):
    """An action of the user's own that fails."""

    def decide(self, norms: Any, state: Any, xp: Any) -> InStepDecision:
        raise ValueError("a bug of theirs")

    def config(self) -> dict[str, Any]:
        return {}


def test_an_action_that_fails_is_switched_off_and_the_record_goes_on(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "gradwatch")
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_torch(model, optimizer, run_dir=run_dir, actions=[Broken(), Clip(max_norm=1.0)]) as watcher:
        for x, y in data(4):
            mse(model, x, y).backward()
            optimizer.step()
    assert watcher.faults.messages == {"in-step actions": "ValueError: a bug of theirs"}
    assert watcher.overhead()["steps"] == 4


def test_a_failure_while_the_learning_rate_is_scaled_gives_the_rate_back(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "gradwatch")
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_torch(model, optimizer, run_dir=run_dir, actions=[DecayLR()]) as watcher:
        watcher._policy.state.lr_factor = 0.5
        monkeypatch.setattr(Pending, "read", _boom)
        mse(model, *data(1)[0]).backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.1
