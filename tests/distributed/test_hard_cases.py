"""Where ranks differ: their parameters, their batches, their speed, their fate. Nothing hangs, the record is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.optim import SGD

from tests.distributed.pool import Pool
from tests.distributed.problem import batch, network

#: On two processes and on four; without it on two.
BOTH = pytest.mark.parametrize("pool", [2, 4], indirect=True, ids=["two", "four"])


@pytest.fixture(scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(getattr(request, "param", 2))
    yield made
    made.close()


@pytest.fixture
def doomed(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(request.param)
    yield made
    made.close()


def test_stages_of_a_pipeline_are_one_record_and_clipped_by_one_norm(pool: Pool, tmp_path: Path) -> None:
    model = network()
    optimizer, norms = SGD(model.parameters(), lr=0.05), []
    del model[3], model[1]  # the stages by hand have one activation
    model.insert(2, nn.Tanh())
    for step in range(8):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.mse_loss(model(x), y).backward()
        norms.append([float(parameter.grad.norm()) for parameter in model.parameters() if parameter.grad is not None])
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    results = pool.run("pipeline", run_dir=str(tmp_path / "run"))

    record = results[0][1]
    assert [name.partition(".")[0] for name in record["names"]] == ["stage0"] * 2 + ["stage1"] * 4
    np.testing.assert_allclose(record["norms"], norms, rtol=1e-4)
    weights = [weight for result in results for weight in result[0]]
    for mine, reference in zip(weights, model.parameters(), strict=True):
        np.testing.assert_allclose(mine, reference.detach().numpy(), atol=1e-5)


def test_experts_of_one_name_are_taken_together_and_shared_layers_once(pool: Pool, tmp_path: Path) -> None:
    results = pool.run("experts", run_dir=str(tmp_path / "run"))

    record = results[0][1]
    experts = np.array([[norm for norm, _ in norms] for norms, _ in results])
    shared = [norm for _, norm in results[0][0]]
    column = record["names"].index
    np.testing.assert_allclose(record["norms"][:, column("expert.weight")], np.sqrt((experts**2).sum(0)), rtol=1e-5)
    np.testing.assert_allclose(record["norms"][:, column("shared.weight")], shared, rtol=1e-5)


@BOTH
def test_unused_parameters_do_not_stop_the_ranks(pool: Pool, tmp_path: Path) -> None:
    results = pool.run("unused", run_dir=str(tmp_path / "run"))

    record = results[0][1]
    for mine, first in zip(results[1][0], results[0][0], strict=True):
        np.testing.assert_array_equal(mine, first)
    assert len(record["steps"]) == 6
    assert (record["norms"][:, record["names"].index("parts.used.weight")] > 0).all()


@BOTH
@pytest.mark.parametrize("actions", ["", "DecayLR"])
def test_uneven_inputs_do_not_hang_and_are_recorded(pool: Pool, tmp_path: Path, actions: str) -> None:
    results = pool.run("uneven", run_dir=str(tmp_path / "run"), actions=actions)

    record = results[0][1]
    assert record["steps"] == list(range(20))
    assert record["status"] == "finished"
    assert bool(record["marks"]) == bool(actions)  # without actions there is nothing to agree on


def test_watching_on_rank_0_only_records_its_part_and_says_so(pool: Pool, tmp_path: Path) -> None:
    record = pool.run("only_rank_0", run_dir=str(tmp_path / "run"))[0]

    assert record["steps"] == list(range(12))
    assert "only what rank 0 measures is recorded" in record["marks"][0]


@BOTH
def test_a_slow_rank_is_waited_for(pool: Pool, tmp_path: Path) -> None:
    record = pool.run("slow", run_dir=str(tmp_path / "run"))[0]

    assert record["steps"] == list(range(12))
    assert record["marks"] == []


def test_each_ranks_own_norm_tells_which_one_had_the_bad_batch(pool: Pool, tmp_path: Path) -> None:
    results = pool.run("personal", run_dir=str(tmp_path / "run"))

    record = results[0][1]
    for rank, (own, _) in enumerate(results):
        np.testing.assert_allclose(record["metrics"][f"rank_norm.{rank}"], own, rtol=1e-5)
    assert "rank 1 alone: its gradient is not finite" in record["marks"][0]
    assert "rank 1 alone: its gradient norm is" in record["marks"][1]
    assert record["metrics"]["skipped"][6] == 1.0


@pytest.mark.parametrize(("doomed", "kind"), [(2, "ddp"), (4, "fsdp2")], indirect=["doomed"])
def test_a_rank_that_is_killed_is_in_the_record(doomed: Pool, tmp_path: Path, kind: str) -> None:
    results = doomed.run("killed", run_dir=str(tmp_path / "run"), kind=kind)

    assert results[1:] == [None] * (doomed.count - 1)
    error, record = results[0]
    assert error == "RuntimeError"  # torch's own
    assert record["steps"][:8] == list(range(8))
    assert record["status"] == "crashed"
    assert f"no sign of life from rank {doomed.count - 1};" in record["marks"][-1]


def test_a_restart_with_another_number_of_ranks_goes_on_with_the_run(pool: Pool, tmp_path: Path) -> None:
    pool.run("first_life", run_dir=str(tmp_path / "run"))
    smaller = Pool(3)
    try:
        record = smaller.run("first_life", run_dir=str(tmp_path / "run"))[0]
    finally:
        smaller.close()

    assert record["steps"] == list(range(10))
    assert record["world_size"] == 3
    assert record["marks"] == ["resumed with 3 ranks; there were 2 before"]


@pytest.mark.parametrize("actions", ["Clip", "Clip per layer", "Clip by value", "SkipStep and Clip", "ZClip"])
def test_actions_on_parts_read_no_number_of_an_accelerator_on_the_host(
    pool: Pool, tmp_path: Path, actions: str
) -> None:
    results = pool.run("as_on_accelerator", run_dir=str(tmp_path / "device"), actions=actions)
    host = pool.run("as_on_accelerator", run_dir=str(tmp_path / "host"), actions=actions, is_host=True)

    for mine, other in zip(results, host, strict=True):
        assert mine["waits"] == []
        assert other["waits"] != []
        assert mine["collectives"] == [2 if actions == "Clip by value" else 1] * 4  # which is measured before and after
        for left, right in zip(mine["weights"], other["weights"], strict=True):
            np.testing.assert_allclose(left, right, atol=1e-6)
    np.testing.assert_allclose(results[0]["record"]["norms"], host[0]["record"]["norms"], rtol=1e-5)


def test_each_ranks_own_norm_is_not_waited_for_on_an_accelerator(pool: Pool, tmp_path: Path) -> None:
    arguments = {"actions": "", "kind": "ddp", "per_rank": True}
    results = pool.run("as_on_accelerator", run_dir=str(tmp_path / "device"), **arguments)
    host = pool.run("as_on_accelerator", run_dir=str(tmp_path / "host"), is_host=True, **arguments)

    assert [result["waits"] for result in results] == [[], []]
    for rank in range(2):
        mine, other = (each[0]["record"]["metrics"][f"rank_norm.{rank}"] for each in (results, host))
        np.testing.assert_allclose(mine, other, rtol=1e-6)
