import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch as gw
from gradwatch.errors import ModelError
from gradwatch.integrations.torch_watch import watch_torch

STATISTICS = ("activation_mean", "activation_std", "saturated_fraction", "dead_fraction", "output_grad_norm")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))


def train(net: nn.Module, run_dir: Path | None, *, steps: int = 21) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    watcher = watch_torch(net, optimizer, run_dir=run_dir, activations=True) if run_dir else None
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(12, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    if watcher:
        watcher.close()


def test_each_activation_module_is_sampled_at_every_tenth_step(run_dir: Path) -> None:
    train(model(), run_dir)

    run = gw.load(run_dir)
    assert run.info.modules == ("1", "3")
    for name in STATISTICS:
        assert list(run.statistic(name).dropna(how="all").index) == [0, 10, 20]


def test_what_is_sampled_is_what_the_outputs_are(run_dir: Path) -> None:
    net = model()
    twin = copy.deepcopy(net)
    train(net, run_dir, steps=1)
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    hidden = twin[1](twin[0](inputs))
    outputs = twin[3](twin[2](hidden))
    outputs.retain_grad()
    twin[4](outputs).square().mean().backward()
    assert outputs.grad is not None

    run = gw.load(run_dir)

    assert run.statistic("activation_mean").loc[0, "3"] == pytest.approx(outputs.mean().item(), rel=1e-5)
    assert run.statistic("activation_std").loc[0, "3"] == pytest.approx(outputs.std(correction=0).item(), rel=1e-5)
    assert run.statistic("saturated_fraction").loc[0, "3"] == float((outputs.abs() >= 0.995).float().mean())
    assert run.statistic("dead_fraction").loc[0, "1"] == float((hidden == 0).all(dim=0).float().mean())
    assert run.statistic("output_grad_norm").loc[0, "3"] == pytest.approx(outputs.grad.norm().item(), rel=1e-5)


def test_sampling_leaves_the_training_bit_identical(run_dir: Path) -> None:
    plain, watched = model(), model()
    train(plain, None)
    train(watched, run_dir)

    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_dead_units_are_found(run_dir: Path) -> None:
    net = model()
    nn.init.constant_(net[0].bias, -100.0)  # type: ignore[arg-type]  # a Linear's bias
    train(net, run_dir, steps=60)

    run = gw.load(run_dir)
    assert "dying_relu" in {finding.rule for finding in run.finding_list()}
    np.testing.assert_array_equal(run.statistic("dead_fraction")["1"].dropna(), 1.0)


def test_hooks_sit_on_the_model_only_for_a_sampled_step_and_never_after_close(run_dir: Path) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    hooked = []
    with watch_torch(net, optimizer, run_dir=run_dir, activations=True):
        for step in range(20):
            net(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            if any(module._forward_hooks for module in net):
                hooked.append(step)
        pickle.dumps(net.state_dict())

    assert hooked == [9, 19]
    assert not any(module._forward_hooks for module in net)


def test_a_compiled_model_is_refused(run_dir: Path) -> None:
    net = model()
    net.compile(backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

    with pytest.raises(ModelError, match="'activations' must be False for a compiled model"):
        watch_torch(net, optimizer, run_dir=run_dir, activations=True)
