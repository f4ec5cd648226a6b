"""A training whose every receiver is dead ends with the same bits as one that is not watched (law 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch as gw


def fail(_: gw.alerts.Message) -> None:
    raise ConnectionError("dead")


def trained(run_dir: Path | None, **settings: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)  # explodes
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    watcher = gw.watch(model, optimizer, run_dir=run_dir, **settings) if run_dir else None
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    if watcher:
        assert watcher.findings
        watcher.close()
        assert watcher.faults.counts == {}
    return [parameter.detach().view(torch.int32).clone() for parameter in model.parameters()], torch.get_rng_state()


def test_dead_receivers_change_no_bit_of_the_training(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook = gw.alerts.Webhook("http://127.0.0.1:9/", close_seconds=5)
    plain, plain_state = trained(None)
    watched, watched_state = trained(run_dir, alerts=[hook, fail, "command:false"])

    assert all(map(torch.equal, plain, watched))
    assert torch.equal(plain_state, watched_state)
    assert "could not deliver" in caplog.text
