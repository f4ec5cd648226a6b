"""A watched model, optimizer and loss module can be copied, pickled and saved; the copies are not watched."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.torch.loops import assert_same, data, mlp, watching


def _saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),  # noqa: S301 -- made in this very line
    "torch.save": _saved,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_equal_and_unwatched(run_dir: Path, name: str) -> None:
    model, loss_fn = mlp(), nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, i: int) -> None:
        x, y = data(4)[i]
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    with watching(run_dir, model, optimizer, loss_fn=loss_fn) as (watcher, record):
        step(model, optimizer, loss_fn, 0)
        other, of_other, other_loss = COPIES[name]((model, optimizer, loss_fn))
        assert_same(other.state_dict(), model.state_dict())
        assert_same(of_other.state_dict(), optimizer.state_dict())
        step(other, of_other, other_loss, 1)
        watcher.mark("copied")
        step(model, optimizer, loss_fn, 1)
        assert_same(other.state_dict(), model.state_dict())
    assert len(record) == 2


def test_a_state_dict_loads_into_a_watched_model_and_optimizer(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(3):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (record.norms > 0).all()
    assert len(record) == 3


def test_saving_while_a_gradient_is_pending_works(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer):
        (model(data(1)[0][0])).square().mean().backward()
        assert_same(_saved(model).state_dict(), model.state_dict())
        optimizer.step()
