"""What cannot be watched is refused at the call, with an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch as gw
from gradwatch.errors import ConfigurationError, MissingDependencyError, ModelError, UnknownNameError
from tests.torch.loops import mlp, watching


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        (nn.ReLU(), None, "ReLU has no parameters to watch"),
        (nn.LazyLinear(3), None, "parameter 'weight' is not initialised yet: run one batch"),
        ("model", None, r"'model' must be a torch.nn.Module or a Keras model: str"),
        (mlp(), torch.optim.SGD(nn.Linear(2, 2).parameters()), "SGD holds none of the parameters of Sequential"),
        (mlp(), "adam", "'optimizer' must be a torch.optim.Optimizer, a list of them, or None: 'adam'"),
        (mlp(), [3], "'optimizer' must be a torch.optim.Optimizer, a list of them, or None: 3"),
    ],
)
def test_what_cannot_be_watched(run_dir: Path, model: Any, optimizer: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        gw.watch(model, optimizer, run_dir=run_dir)
    assert not run_dir.exists()


def test_a_loss_that_is_no_module(run_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"'loss_fn' must be a torch.nn.Module: <function"):
        gw.watch(mlp(), run_dir=run_dir, loss_fn=nn.functional.mse_loss)


def test_a_torch_that_is_too_old(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nn.utils.clip_grad, "_clip_grads_with_norm_")

    with pytest.raises(MissingDependencyError, match=r"gradwatch needs PyTorch 2.6 or newer: 2\."):
        gw.watch(mlp(), run_dir=run_dir)
    assert not run_dir.exists()


def test_an_unknown_setting(run_dir: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown setting 'run_dri'; did you mean 'run_dir'\?"):
        gw.watch(mlp(), run_dri=run_dir)  # type: ignore[call-arg]  # on purpose


def test_a_logged_value_that_is_no_number(run_dir: Path) -> None:
    with (
        watching(run_dir, mlp()) as (watcher, _),
        pytest.raises(ConfigurationError, match="'loss' must be a number or a scalar tensor"),
    ):
        watcher.log(loss=torch.ones(3))
