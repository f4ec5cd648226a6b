"""Every way of torch to spread a training over ranks records the norms of one process, and acts alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from torch.optim import Adam

from tests.distributed.pool import Pool
from tests.distributed.problem import batch, network

STEPS = 12
TWO = ("ddp", "no_sync", "zero", "fsdp2", "fsdp1", "tp")


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(request.param)
    yield made
    made.close()


def kinds(pool: Pool) -> tuple[str, ...]:
    return TWO if pool.count == 2 else (*TWO, "hsdp")


def alone(clip: float = 0.0, skipped: tuple[int, ...] = ()) -> tuple[Any, Any, list[Any]]:
    """Norms, what `clip_grad_norm_` returned, and the weights, of one process."""
    model = network()
    optimizer = Adam(model.parameters(), lr=0.05, foreach=False)
    norms, totals = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.mse_loss(model(x), y).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        norms.append([float(grad.double().norm()) for grad in grads if grad is not None])
        totals.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        if step not in skipped:
            optimizer.step()
    return np.array(norms), np.array(totals), [p.detach().numpy() for p in model.parameters()]


def assert_alike(results: list[Any]) -> None:
    for result in results[1:]:
        for mine, first in zip(result["weights"], results[0]["weights"], strict=True):
            np.testing.assert_array_equal(mine, first)


def test_the_norms_are_those_of_one_process(pool: Pool, tmp_path: Path) -> None:
    norms, _, _ = alone()
    for kind in kinds(pool):
        record = pool.run("train", kind=kind, run_dir=str(tmp_path / kind))[0]["record"]

        assert record["names"] == [name for name, _ in network().named_parameters()], kind
        np.testing.assert_allclose(record["norms"], norms, rtol=1e-5, err_msg=kind)
        assert record["world_size"] == pool.count


def test_the_training_is_the_one_without_gradwatch(pool: Pool, tmp_path: Path) -> None:
    for kind in kinds(pool):
        watched = pool.run("train", kind=kind, run_dir=str(tmp_path / kind))
        plain = pool.run("train_plain", kind=kind)

        for mine, bare in zip(watched, plain, strict=True):
            for left, right in zip(mine["weights"], bare, strict=True):
                np.testing.assert_array_equal(left, right, err_msg=kind)


def test_clip_takes_the_norm_of_the_whole(pool: Pool, tmp_path: Path) -> None:
    norms, totals, weights = alone(clip=0.05)
    for kind in kinds(pool):
        results = pool.run("train", kind=kind, run_dir=str(tmp_path / kind), actions="Clip")

        assert_alike(results)
        metrics = results[0]["record"]["metrics"]
        np.testing.assert_allclose(results[0]["record"]["norms"], norms, rtol=1e-4, err_msg=kind)
        np.testing.assert_allclose(metrics["global_norm"], totals, rtol=1e-5, err_msg=kind)
        np.testing.assert_allclose(metrics["clip_coefficient"], np.minimum(0.05 / totals, 1.0), rtol=1e-4)
        for mine, reference in zip(results[0]["weights"], weights, strict=True):
            np.testing.assert_allclose(mine, reference, atol=2e-4, err_msg=kind)


def test_what_the_users_own_clipping_returned_is_the_global_norm(pool: Pool, tmp_path: Path) -> None:
    for kind in kinds(pool):
        result = pool.run("train", kind=kind, run_dir=str(tmp_path / kind), clip=0.05)[0]
        metrics = result["record"]["metrics"]

        np.testing.assert_allclose(metrics["global_norm"], result["totals"], rtol=1e-5, err_msg=kind)
        np.testing.assert_allclose(metrics["clip_coefficient"], 0.05 / np.array(result["totals"]), rtol=1e-4)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(pool: Pool, tmp_path: Path) -> None:
    _, _, weights = alone(skipped=(4,))
    for kind in kinds(pool):
        results = pool.run("train", kind=kind, run_dir=str(tmp_path / kind), actions="SkipStep", bad=(4,))

        assert_alike(results)
        assert np.flatnonzero(results[0]["record"]["metrics"]["skipped"]).tolist() == [4], kind
        for mine, reference in zip(results[0]["weights"], weights, strict=True):
            np.testing.assert_allclose(mine, reference, atol=2e-4, err_msg=kind)


@pytest.mark.parametrize("action", ["DecayLR", "Rollback"])
def test_ranks_act_at_the_same_step(pool: Pool, tmp_path: Path, action: str) -> None:
    for kind in kinds(pool):
        results = pool.run("train", kind=kind, run_dir=str(tmp_path / kind), actions=action, steps=24)

        assert_alike(results)
        record = results[0]["record"]
        assert record["actions"]["action"] == [action], kind
        factors = record["metrics"]["lr_factor"]
        # Two exchanges of five steps behind the finding at the latest, three where the norms come with the first.
        assert factors[:15] == [1.0] * 15, kind
        assert len(set(factors[20:])) == 1, kind
        assert 0.0 < factors[20] <= 0.5, kind


def test_there_is_no_collective_between_flushes(pool: Pool, tmp_path: Path) -> None:
    for kind in kinds(pool):
        for result in pool.run("train", kind=kind, run_dir=str(tmp_path / kind), stats_every=100, settle=True):
            counts = result["collectives"]

            # Two to meet; one for each flush of five steps, another where a sampled step (0) is among them.
            is_talking = kind in ("fsdp1", "fsdp2", "hsdp", "tp")
            assert counts == ([2] * 5 + [4] * 5 + [5] * 2 if is_talking else [0] * STEPS), kind


def test_clip_costs_one_collective_a_step(pool: Pool, tmp_path: Path) -> None:
    for kind in kinds(pool):
        counts = pool.run("train", kind=kind, run_dir=str(tmp_path / kind), actions="Clip", settle=True)[0][
            "collectives"
        ]

        is_talking = kind in ("fsdp1", "fsdp2", "hsdp", "tp")
        assert np.diff(counts)[:4].tolist() == [int(is_talking)] * 4, kind
