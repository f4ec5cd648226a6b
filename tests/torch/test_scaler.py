"""`torch.amp.GradScaler`: unscaled norms, overflow steps that say why they were skipped, fused optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.actions import Clip, SkipStep
from gradwatch.records import SKIP_REASONS
from tests.torch.loops import Recorder, assert_norms, data, mlp, mse, reference, watching

GRAD_SCALER = SKIP_REASONS.index("grad_scaler")
OVERFLOWS = (0, 7, 8)


def _train(
    run_dir: Path, *, fused: bool, unscale: bool, clip: float | None = None, **settings: Any
) -> tuple[Recorder, list[list[float]], nn.Module]:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=3)
    expected = []
    with watching(run_dir, model, optimizer, stats_every=4, **settings) as (_, record):
        for i, (x, y) in enumerate(data(16)):
            optimizer.zero_grad()
            loss = mse(model, x, y)
            if i in OVERFLOWS:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            expected.append([norm / scale for norm in reference(model.parameters())])
            if unscale:
                scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    return record, expected, model


@pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "in step"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_norms_are_unscaled(run_dir: Path, fused: bool, unscale: bool) -> None:
    record, expected, _ = _train(run_dir, fused=fused, unscale=unscale)
    good = [i not in OVERFLOWS for i in range(16)]
    assert_norms(record.norms[good], np.array(expected)[good])
    assert not np.isfinite(record.norms[list(OVERFLOWS)]).all(axis=1).any()


@pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "in step"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_step_that_the_scaler_skips_is_recorded_with_its_reason(run_dir: Path, fused: bool, unscale: bool) -> None:
    record, _, _ = _train(run_dir, fused=fused, unscale=unscale)
    skipped = [i in OVERFLOWS for i in range(16)]
    assert record.metric("skipped").tolist() == skipped
    assert record.reasons == [GRAD_SCALER if skip else 0 for skip in skipped]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_the_largest_gradient_is_unscaled_too(run_dir: Path, fused: bool) -> None:
    record, _, _ = _train(run_dir, fused=fused, unscale=False)
    largest = record.samples("grad_max")[4]
    assert (largest <= record.norms[4]).all()
    assert (largest >= record.norms[4] / 16).all()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_clipping_between_unscale_and_step_is_seen(run_dir: Path, fused: bool) -> None:
    record, expected, _ = _train(run_dir, fused=fused, unscale=True, clip=0.1)
    good = [i not in OVERFLOWS for i in range(16)]
    assert_norms(record.norms[good], np.array(expected)[good])
    totals = np.linalg.norm(np.array(expected)[good], axis=1)
    np.testing.assert_allclose(record.metric("clip_coefficient")[good], np.minimum(0.1 / (totals + 1e-6), 1), rtol=1e-5)


@pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "in step"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_clip_ends_where_clipping_by_hand_ends(run_dir: Path, tmp_path: Path, fused: bool, unscale: bool) -> None:
    _, _, ours = _train(run_dir, fused=fused, unscale=unscale, actions=[Clip(max_norm=0.1)])
    _, _, theirs = _train(tmp_path / "other", fused=fused, unscale=True, clip=0.1)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_skip_step_leaves_an_overflow_to_the_scaler(run_dir: Path, tmp_path: Path, fused: bool) -> None:
    record, _, ours = _train(run_dir, fused=fused, unscale=False, actions=[SkipStep()])
    _, _, theirs = _train(tmp_path / "other", fused=fused, unscale=False)
    assert record.reasons == [GRAD_SCALER if i in OVERFLOWS else 0 for i in range(16)]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_disabled_scaler_changes_nothing(run_dir: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    expected = []
    with watching(run_dir, model, optimizer) as (_, record):
        for x, y in data(4):
            optimizer.zero_grad()
            scaler.scale(mse(model, x, y)).backward()
            expected.append(reference(model.parameters()))
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert_norms(record.norms, expected)


def test_one_scaler_for_two_optimizers(run_dir: Path) -> None:
    model = mlp()
    of_first = torch.optim.SGD(model[:3].parameters(), lr=0.1)
    of_last = torch.optim.SGD(model[4].parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    expected = []
    with watching(run_dir, model, [of_first, of_last]) as (_, record):
        for x, y in data(6):
            model.zero_grad()
            scaler.scale(mse(model, x, y)).backward()
            expected.append([norm / 256 for norm in reference(model.parameters())])
            scaler.unscale_(of_first)
            nn.utils.clip_grad_norm_(model[:3].parameters(), 0.01)
            scaler.step(of_first)
            scaler.step(of_last)
            scaler.update(256.0)
    assert_norms(record.norms, expected)
