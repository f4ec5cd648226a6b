"""Trainers on two processes record what the plain loop on one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.optim import SGD

import gradwatch as gw
from tests.distributed.pool import Pool
from tests.integrations import plain

TRAINERS = pytest.mark.parametrize(
    "trainer",
    [
        pytest.param("accelerate", marks=pytest.mark.framework("transformers")),
        pytest.param("transformers", marks=pytest.mark.framework("transformers")),
        pytest.param("lightning", marks=pytest.mark.framework("lightning")),
    ],
)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


@TRAINERS
def test_the_norms_are_those_of_one_process(pool: Pool, tmp_path: Path, trainer: str) -> None:
    results = pool.run(f"trainers:{trainer}", run_dir=str(tmp_path / trainer))
    plain.train(tmp_path / "plain")

    np.testing.assert_allclose(results[0]["norms"], plain.norms(tmp_path / "plain"), rtol=1e-5)
    assert results[0]["world_size"] == 2
    assert results[0]["marks"] == []
    assert not any(name.startswith("module.") for name in results[0]["names"])
    assert [result["talks"] for result in results] == [False, False]  # the gradients are known to be alike


@TRAINERS
def test_clip_acts_alike_on_both(pool: Pool, tmp_path: Path, trainer: str) -> None:
    results = pool.run(f"trainers:{trainer}", run_dir=str(tmp_path / trainer), actions=[gw.Clip(max_norm=0.5)])
    net = plain.train(tmp_path / "plain", actions=[gw.Clip(max_norm=0.5)])

    assert results[0]["clip_coefficient"].min() < 1.0
    for result in results:
        for mine, reference in zip(result["weights"], net.parameters(), strict=True):
            np.testing.assert_allclose(mine, reference.detach().numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_records_the_norms_of_one_process(pool: Pool, tmp_path: Path, stage: int, accumulate: int) -> None:
    arguments = {"stage": stage, "clip": 0.5, "accumulate": accumulate}
    result = pool.run("trainers:deepspeed", run_dir=str(tmp_path / "ds"), **arguments)[0]
    net = plain.train(tmp_path / "plain", max_norm=0.5)

    np.testing.assert_allclose(result["norms"], plain.norms(tmp_path / "plain"), rtol=1e-5)
    expected = gw.load(tmp_path / "plain").metrics()["clip_coefficient"]
    np.testing.assert_allclose(result["metrics"]["clip_coefficient"], expected, rtol=1e-4)
    assert result["metrics"]["lr"] == [plain.RATE] * plain.STEPS
    assert np.isfinite(result["metrics"]["loss"]).all()
    assert result["shapes"] == [tuple(parameter.shape) for parameter in net.parameters()]
    assert result["marks"] == []


@pytest.mark.needs("deepspeed")
def test_actions_under_deepspeed_are_refused(pool: Pool, tmp_path: Path) -> None:
    errors = pool.run("trainers:deepspeed_with_actions", run_dir=str(tmp_path / "ds"))

    assert errors == ["'actions' are not carried out under DeepSpeed: use its gradient_clipping"] * 2


@pytest.mark.needs("deepspeed")
@pytest.mark.framework("transformers")
@pytest.mark.parametrize("stage", [1, 3])
def test_the_trainer_on_deepspeed_records_the_norms_of_one_process(pool: Pool, tmp_path: Path, stage: int) -> None:
    found = pool.run("trainers:transformers_with_deepspeed", run_dir=str(tmp_path / "hf"), stage=stage)[0]

    # Without a GPU, Accelerate gives DeepSpeed all data on each rank.
    net, (x, y), norms = plain.model(), plain.data(), []
    optimizer = SGD(net.parameters(), lr=plain.RATE)
    for rows, targets in zip(x.split(plain.BATCH // 2), y.split(plain.BATCH // 2), strict=True):
        optimizer.zero_grad()
        plain.loss_of(net(rows), targets).backward()
        norms.append([float(p.grad.double().norm()) for p in net.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    np.testing.assert_allclose(found, norms, rtol=1e-5)
