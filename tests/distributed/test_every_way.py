"""Every way of torch to spread a training over ranks records the norms of one process, and acts alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from torch.optim import SGD, Adam

from tests.distributed.pool import Pool
from tests.distributed.problem import batch, network, sequences, transformer_like

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
    samples = []
    for kind in kinds(pool):
        record = pool.run("train", kind=kind, run_dir=str(tmp_path / kind))[0]["record"]

        assert record["names"] == [name for name, _ in network().named_parameters()], kind
        np.testing.assert_allclose(record["norms"], norms, rtol=1e-5, err_msg=kind)
        assert record["world_size"] == pool.count
        samples.append([record[name] for name in ("weight_norm", "update_ratio", "grad_max")])
    # Those of `ddp` were measured whole, those of others put together.
    for kind, found in zip(kinds(pool), samples, strict=True):
        for mine, first in zip(found, samples[0], strict=True):
            np.testing.assert_allclose(mine, first, rtol=1e-4, err_msg=kind)


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

            # Two to meet, and one for each flush of five steps, whether a sampled step (0) is among them or not.
            is_talking = kind in ("fsdp1", "fsdp2", "hsdp", "tp")
            assert counts == ([2] * 5 + [3] * 5 + [4] * 2 if is_talking else [0] * STEPS), kind


def test_clip_costs_one_collective_a_step(pool: Pool, tmp_path: Path) -> None:
    for kind in kinds(pool):
        counts = pool.run("train", kind=kind, run_dir=str(tmp_path / kind), actions="Clip", settle=True)[0][
            "collectives"
        ]

        is_talking = kind in ("fsdp1", "fsdp2", "hsdp", "tp")
        assert np.diff(counts)[:4].tolist() == [int(is_talking)] * 4, kind


def alone_with_sequences(clip: float = 0.0, decay: float = 0.0) -> tuple[Any, Any, list[Any]]:
    """Norms, what `clip_grad_norm_` returned, and the weights, of one process."""
    model = transformer_like()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=decay) if decay else Adam(model.parameters(), lr=0.05)
    norms, totals = [], []
    for step in range(8):
        optimizer.zero_grad()
        x, y = sequences(step)
        nn.functional.mse_loss(model(x), y).backward()
        norms.append([float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None])
        totals.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
    return np.array(norms), np.array(totals), [p.detach().numpy() for p in model.parameters()]


def test_gradients_that_are_sums_over_ranks_are_recorded_as_the_step_adds_them_up(pool: Pool, tmp_path: Path) -> None:
    norms, totals, weights = alone_with_sequences()

    results = pool.run("sequence_parallel", run_dir=str(tmp_path / "run"))

    np.testing.assert_allclose(results[0]["record"]["norms"], norms, rtol=1e-5)
    np.testing.assert_allclose(results[0]["record"]["metrics"]["global_norm"], totals, rtol=1e-5)
    assert results[0]["record"]["marks"] == []
    for mine, reference in zip(results[0]["weights"], weights, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)


def test_gradients_that_are_sums_over_ranks_are_recorded_before_the_loop_clips(pool: Pool, tmp_path: Path) -> None:
    norms, totals, _ = alone_with_sequences(clip=0.05)

    record = pool.run("sequence_parallel", run_dir=str(tmp_path / "run"), clip=0.05)[0]["record"]

    np.testing.assert_allclose(record["norms"], norms, rtol=1e-4)
    np.testing.assert_allclose(record["metrics"]["clip_coefficient"], 0.05 / totals, rtol=1e-4)


def test_clip_takes_the_norm_of_gradients_that_are_sums_over_ranks(pool: Pool, tmp_path: Path) -> None:
    norms, totals, weights = alone_with_sequences(clip=0.05)

    results = pool.run("sequence_parallel", run_dir=str(tmp_path / "run"), actions="Clip")

    record = results[0]["record"]
    np.testing.assert_allclose(record["norms"], norms, rtol=1e-4)
    np.testing.assert_allclose(record["metrics"]["clip_coefficient"], 0.05 / totals, rtol=1e-4)
    for result in results:
        for mine, reference in zip(result["weights"], weights, strict=True):
            np.testing.assert_allclose(mine, reference, atol=2e-4)


def test_sums_over_ranks_that_no_step_adds_up_are_missing_and_a_mark_says_so(pool: Pool, tmp_path: Path) -> None:
    norms, _, _ = alone_with_sequences(decay=0.01)

    result = pool.run("sequence_parallel", run_dir=str(tmp_path / "run"), steps=40, decay=0.01)[0]

    record = result["record"]
    assert np.isnan(record["norms"][:, :2]).all()
    np.testing.assert_allclose(record["norms"][:8, 2:], norms[:, 2:], rtol=1e-4)
    (mark,) = record["marks"]
    assert "'0.weight', '0.bias' are sums over ranks (Partial) that the step did not add up" in mark
    assert "unused" not in result["findings"]


def test_sums_over_ranks_are_added_up_by_fully_shard(pool: Pool, tmp_path: Path) -> None:
    norms, _, _ = alone_with_sequences()

    record = pool.run("sequence_parallel", run_dir=str(tmp_path / "run"), is_sharded=True)[0]["record"]

    np.testing.assert_allclose(record["norms"], norms, rtol=1e-5)
