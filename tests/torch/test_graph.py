"""What the autograd graph of the loss tells: activations in functional form, and the order of use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwatch.backends import torch_graph
from gradwatch.backends.torch_graph import read_graph
from tests.torch.loops import watching


class Backwards(nn.Module):
    """Defines its layers in the reverse order of their use, with activations in functional form."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.last, self.norm = nn.Linear(8, 2), nn.BatchNorm1d(8)
        self.middle, self.first = nn.Linear(8, 8), nn.Linear(4, 8)
        self.activation = activation

    def forward(self, x: Tensor) -> Any:
        hidden = self.activation(self.first(x))
        hidden = functional.dropout(hidden, 0.1)
        return self.last(self.activation(self.norm(self.middle(hidden))))


ACTIVATIONS: dict[str, Any] = {
    "ReLU": functional.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid, "GELU": functional.gelu,
    "SiLU": functional.silu, "LeakyReLU": functional.leaky_relu, "ELU": functional.elu,
    "Softplus": functional.softplus, "Hardtanh": functional.relu6, "Mish": functional.mish,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_functional_activation_is_known_from_the_logged_loss(run_dir: Path, name: str, when: str) -> None:
    model = Backwards(ACTIVATIONS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer) as (watcher, record):
        for _ in range(2):
            loss = model(torch.randn(6, 4)).square().mean()
            if when == "before":
                watcher.log(loss=loss)
            loss.backward()
            optimizer.step()
            if when == "after":
                watcher.log(loss=loss)
    found = {p.layer: p.activation for p in record.batches[0].parameters}
    assert found == {"last": "", "norm": name, "middle": name, "first": name}


def test_depth_is_the_order_of_use_not_of_definition(run_dir: Path) -> None:
    model = Backwards(functional.relu)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(run_dir, model, optimizer) as (_, record):
        for _ in range(2):
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
    layers = sorted(record.batches[0].parameters, key=lambda p: p.depth)
    assert list(dict.fromkeys(p.layer for p in layers)) == ["first", "middle", "norm", "last"]


def test_a_block_of_convolution_norm_and_residual_is_followed_by_its_activation() -> None:
    conv, norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    loss = functional.relu(norm(conv(x)) + x).mean()
    uses = read_graph(loss.grad_fn, {id(conv.weight): 0, id(norm.weight): 1})
    assert [uses[place].activation for place in (0, 1)] == ["ReLU", "ReLU"]
    assert uses[0].order < uses[1].order


def test_the_walk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_graph, "MOST_NODES", 50)
    cell = nn.RNNCell(4, 4)
    hidden = torch.zeros(1, 4)
    for _ in range(500):
        hidden = cell(torch.ones(1, 4), hidden)
    users, _ = torch_graph._walk(hidden.sum().grad_fn)
    assert len(users) <= 60


def test_the_walk_leaves_the_graph_usable() -> None:
    layer = nn.Linear(4, 4)
    loss = layer(torch.ones(2, 4)).sum()
    read_graph(loss.grad_fn, {id(layer.weight): 0})
    loss.backward()
    assert layer.weight.grad is not None
