"""Hooks are taken away also where an interrupt came between torch's putting one on and our keeping its handle."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import gradwatch as gw
from gradwatch.integrations import torch_attach


def interrupted(register: Callable[..., Any]) -> Callable[..., Any]:
    def put(*args: Any, **kwargs: Any) -> None:
        register(*args, **kwargs)
        raise KeyboardInterrupt

    return put


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.Tensor, "register_post_accumulate_grad_hook"),
        (nn.Module, "register_forward_hook"),
        (Optimizer, "register_step_pre_hook"),
        (torch_attach, "register_optimizer_step_post_hook"),
    ],
)
def test_an_interrupt_behind_the_putting_of_a_hook_leaves_none(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    model, loss_fn = nn.Linear(2, 1), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = None if owner is torch_attach else optimizer
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))

    with pytest.raises(KeyboardInterrupt):
        gw.watch(model, given, run_dir=run_dir, loss_fn=loss_fn)

    assert not model.weight._post_accumulate_grad_hooks
    assert not loss_fn._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    module = sys.modules[Optimizer.__module__]
    assert not module._global_optimizer_pre_hooks
    assert not module._global_optimizer_post_hooks
