"""Which step a logged number belongs to, wherever in the loop it is logged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.integrations.torch_watch import watch_torch
from gradwatch.run import load
from tests.torch.loops import data, mlp, mse, watching


@pytest.mark.parametrize("where", ["before backward", "between backward and step", "after step"])
def test_the_loss_is_recorded_with_its_own_step(run_dir: Path, where: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with watching(run_dir, model, optimizer) as (watcher, record):
        for x, y in data(6):
            optimizer.zero_grad()
            loss = mse(model, x, y)
            losses.append(loss.item())
            if where == "before backward":
                watcher.log(loss=loss)
            loss.backward()
            if where == "between backward and step":
                watcher.log(loss=loss)
            optimizer.step()
            if where == "after step":
                watcher.log(loss=loss)
    np.testing.assert_allclose(record.metric("loss"), losses, rtol=1e-6)


def test_a_loss_module_makes_the_loss_known_without_a_call(run_dir: Path) -> None:
    model, loss_fn = mlp(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with watching(run_dir, model, optimizer, loss_fn=loss_fn) as (_, record):
        for x, y in data(6):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                loss_fn(model(x), y * 100)
    np.testing.assert_allclose(record.metric("loss"), losses, rtol=1e-6)


def test_a_number_logged_now_and_then_is_recorded_where_it_was_logged(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer) as (watcher, record):
        for i, (x, y) in enumerate(data(6)):
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.step()
            if i % 3 == 2:
                watcher.log(accuracy=i / 10)
    assert [i for i, value in enumerate(record.metric("accuracy")) if np.isfinite(value)] == [2, 5]


def test_a_batch_that_the_loop_leaves_out_is_found_and_nothing_is_done_about_it(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch_torch(model, optimizer, run_dir=run_dir, actions="repair") as watcher:
        for i, (x, y) in enumerate(data(80)):
            optimizer.zero_grad()
            loss = mse(model, x, y) * (torch.nan if i == 30 else 1.0)
            loss.backward()
            if loss.isfinite():
                optimizer.step()
            watcher.log(loss=loss)
    run = load(run_dir)
    assert run.metrics()["discarded"].dropna().to_dict() == {30: 1.0}
    assert [(f.rule, f.severity, f.first_step) for f in watcher.findings] == [("nonfinite", "warning", 30)]
    assert watcher.findings[0].message == "A loss before step 30 was not finite, and the loop took no step with it."
    assert run.actions().empty
