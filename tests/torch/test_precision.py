"""Half precision, float8, and the loss scale of a `GradScaler`, which is recorded and must not collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch.actions import Clip
from gradwatch.backends import torch_device
from gradwatch.integrations.torch import TorchWatcher
from tests.torch.loops import Recorder, assert_norms, data, mlp, mse, reference, watching

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def _scaled_steps(
    run_dir: Path, *, overflows: tuple[int, ...], steps: int, fused: bool = False, **settings: Any
) -> tuple[TorchWatcher, Recorder, list[float]]:
    """Train with a GradScaler that overflows at these steps; also the scale that each step used."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    scales = []
    with watching(run_dir, model, optimizer, **settings) as (watcher, record):
        for i, (x, y) in enumerate(data(steps)):
            optimizer.zero_grad()
            loss = mse(model, x, y) * (float("inf") if i in overflows else 1.0)
            scaler.scale(loss).backward()
            scales.append(scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
    return watcher, record, scales


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "as on a device"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_the_loss_scale_is_recorded_at_every_step(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, fused: bool, on_device: bool
) -> None:
    if on_device:
        monkeypatch.setattr(torch_device, "HOST", ())
    _, record, scales = _scaled_steps(run_dir, overflows=(0, 7, 8), steps=16, fused=fused)
    assert record.metric("grad_scale").tolist() == scales
    assert len(set(scales)) > 2


def test_a_loss_scale_that_collapses_is_a_finding(run_dir: Path) -> None:
    watcher, _, scales = _scaled_steps(run_dir, overflows=tuple(range(5, 40)), steps=45, detectors=["underflow"])
    (finding,) = watcher.findings
    assert (finding.rule, finding.severity) == ("underflow", "critical")
    assert finding.first_step == next(i for i, scale in enumerate(scales) if scale < 1)
    assert f"from {max(scales):g} to" in finding.message
    assert "overflow" in finding.cause


def test_the_search_of_a_new_scaler_for_its_scale_is_no_finding(run_dir: Path) -> None:
    watcher, _, scales = _scaled_steps(run_dir, overflows=tuple(range(14)), steps=20, detectors=["underflow"])
    assert min(scales) == 4.0
    assert watcher.findings == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_records_the_gradients_of_the_float32_weights(run_dir: Path, dtype: torch.dtype) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = []
    with watching(run_dir, model, optimizer, stats_every=3) as (_, record):
        for x, y in data(9):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = mse(model, x, y)
            loss.backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)
    assert all((row > 0).all() for row in record.samples("update_ratio").values())


class _ToFloat8(torch.autograd.Function):
    """Rounds to float8 and back, and the gradient likewise, as layers do that multiply in float8."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.to(torch.float8_e4m3fn).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to(torch.float8_e5m2).to(grads[0].dtype)


_to_float8: Any = _ToFloat8.apply


class Float8Linear(nn.Linear):
    """Keeps its weights in bfloat16 and computes with float8 ones."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name in torch
        return nn.functional.linear(_to_float8(input), _to_float8(self.weight), self.bias)


def test_layers_that_compute_in_float8_are_recorded_as_any_other(run_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Float8Linear(8, 16), nn.ReLU(), Float8Linear(16, 4)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = []
    with watching(run_dir, model, optimizer, stats_every=3, actions=[Clip(max_norm=0.1)]) as (_, record):
        for x, y in data(9):
            optimizer.zero_grad()
            mse(model, x.bfloat16(), y.bfloat16()).backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "as on a device"])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_weights_stored_in_float8_have_norms_but_no_update_ratio(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, on_device: bool
) -> None:
    if on_device:
        monkeypatch.setattr(torch_device, "HOST", ())
    model = nn.ParameterDict({name: torch.randn(64, 40) for name in "abcd"})
    model["stored"] = nn.Parameter(torch.randn(64, 40).to(dtype))

    class Step(torch.optim.SGD):
        """Torch's own optimizers do no arithmetic in float8."""

        def step(self, closure: Any = None) -> Any:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.data = (parameter.float() - 0.1 * parameter.grad.float()).to(parameter.dtype)

    optimizer = Step(model.parameters(), lr=0.1)
    expected = []
    with watching(run_dir, model, optimizer, stats_every=2) as (_, record):
        for _i in range(5):
            optimizer.zero_grad()
            torch.stack([parameter.float().square().sum() for parameter in model.parameters()]).sum().backward()
            expected.append(reference(model.parameters()))
            optimizer.step()
    assert_norms(record.norms, expected, tolerance=1e-6 if not on_device else 1e-5)
    stored = record.names.index("stored")
    assert np.isneginf(record.samples("update_ratio")[2]).tolist() == [i == stored for i in range(5)]
    assert np.isfinite(record.samples("grad_max")[2]).all()
