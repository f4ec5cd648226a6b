"""Opening runs of every kind, picking steps and layers, rollups, following a live run, URLs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from gradwatch.errors import (
    ConfigurationError,
    RunCorruptError,
    RunFormatError,
    RunNotFoundError,
    UnknownNameError,
)
from gradwatch.reader import RunReader
from gradwatch.records import NOT_MEASURED, Parameter, RunInfo, StepBatch
from gradwatch.storage import store
from gradwatch.storage.lock import is_locked
from gradwatch.storage.rollups import coarser, roll_up
from gradwatch.testing import SCENARIOS, synthetic_batches, write_run
from tests.record.building import PARAMETERS, batch_of, store_at


@pytest.fixture
def run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> RunReader:
    """2,345 steps in several segments, the last of them open; a spike at step 1,172."""
    monkeypatch.setattr(store, "SEAL_ROWS", 500)
    target = store_at(run_dir)
    batches = synthetic_batches(steps=2345, parameters=PARAMETERS, scenario="spike", statistics=["weight_norm"])
    for batch in batches:
        for piece in batch.split(100):
            target.append(piece)
            if target.is_full:
                target.end_segment()
                target.seal()
    target.release()
    return RunReader(run_dir)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="does not exist or is empty"):
        RunReader(tmp_path / "missing")


def test_a_directory_of_something_else_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")

    with pytest.raises(RunNotFoundError, match=r"it has no run\.json"):
        RunReader(tmp_path)


def test_a_foreign_run_file_is_told_from_a_newer_one(run: RunReader) -> None:
    facts = json.loads((run.path / "run.json").read_text())
    for content, message in (
        ({"a": 1}, "was not written by gradwatch"),
        ({**facts, "format_version": 2}, "newer gradwatch"),
    ):
        (run.path / "run.json").write_text(json.dumps(content))

        with pytest.raises(RunFormatError, match=message):
            RunReader(run.path)


def test_a_damaged_run_file_without_steps_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format_ver')

    with pytest.raises(RunCorruptError, match="there are no steps"):
        RunReader(tmp_path)


def test_keys_of_later_versions_are_passed_over(run: RunReader) -> None:
    facts = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**facts, "mood": "good"}))

    assert len(RunReader(run.path)) == 2345


def test_an_empty_run_opens(run_dir: Path) -> None:
    store_at(run_dir).release()

    reader = RunReader(run_dir)

    assert len(reader) == 0
    assert reader.span is None
    assert reader.grad_norms().shape == (0, 6)
    assert reader.metrics().empty
    assert reader.rollup(10).maximum.shape == (0, 6)
    assert list(reader.batches()) == []


def test_links_out_of_the_directory_are_not_followed(run: RunReader, tmp_path: Path) -> None:
    outside = tmp_path / "outside.parquet"
    first = min((run.path / "steps").iterdir())
    first.rename(outside)
    first.symlink_to(outside)

    assert len(RunReader(run.path)) == 1845


def test_a_heartbeat_tells_where_there_is_no_lock(run: RunReader) -> None:
    (run.path / "writer.lock").unlink()
    facts = json.loads((run.path / "run.json").read_text())

    for heartbeat, status in ((time.time(), "running"), (time.time() - 1000, "crashed")):
        (run.path / "run.json").write_text(json.dumps({**facts, "heartbeat": heartbeat}))
        assert RunReader(run.path).info.status == status


def test_a_lock_file_that_is_missing_tells_nothing(tmp_path: Path) -> None:
    assert is_locked(tmp_path / "writer.lock") is None


# -- picking -----------------------------------------------------------------------------------------------------------


def test_steps_are_picked_by_number(run: RunReader) -> None:
    assert run.grad_norms(steps=slice(990, 1010)).index.tolist() == list(range(990, 1010))
    assert run.metrics(steps=slice(2340, None)).index.tolist() == list(range(2340, 2345))


def test_layers_are_picked_by_pattern_or_name(run: RunReader) -> None:
    assert run.grad_norms(layers="layers.[01]").shape == (2345, 4)
    assert run.grad_norms(layers=["layers.2"]).columns.tolist() == ["layers.2.weight", "layers.2.bias"]


def test_a_layer_that_matches_nothing_is_named(run: RunReader) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layer 'layer\.0'; did you mean 'layers\.0'"):
        run.grad_norms(layers="layer.0")


def test_layer_norms_are_roots_of_sums_of_squares(run: RunReader) -> None:
    by_parameter, by_layer = run.grad_norms(), run.grad_norms(by="layer")

    wanted = np.hypot(by_parameter["layers.1.weight"].astype(float), by_parameter["layers.1.bias"])
    np.testing.assert_allclose(by_layer["layers.1"], wanted, rtol=1e-6)


def test_a_sampled_statistic_has_rows_where_it_was_taken(run: RunReader) -> None:
    assert run.statistic("weight_norm").index.tolist() == list(range(0, 2345, 10))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda run: run.grad_norms(by="block"), UnknownNameError, "unknown grouping 'block'"),
        (lambda run: run.statistic("gradnorm"), UnknownNameError, "did you mean 'grad_norm'"),
        (lambda run: run.grad_norms(steps=slice(0, 9, 2)), ConfigurationError, "'steps' must be a slice"),
        (lambda run: run.rollup(0), ConfigurationError, "'resolution' must be an integer >= 1: 0"),
        (lambda run: run.grad_norms(resolution=10, aggregate="max"), UnknownNameError, "unknown aggregate 'max'"),
        (lambda run: list(run.batches(0)), ConfigurationError, "'size' must be >= 1: 0"),
        (lambda run: run.resolution_for(0), ConfigurationError, "'bins' must be >= 1: 0"),
    ],
)
def test_misuse_is_named(run: RunReader, call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(run)  # type: ignore[operator]


# -- rollups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [1, 10, 25, 100, 1000, 10_000])
@pytest.mark.parametrize("statistic", ["grad_norm", "weight_norm"])
def test_rollups_equal_those_of_the_steps(run: RunReader, resolution: int, statistic: str) -> None:
    step, values, names = run.values(statistic)

    found, wanted = (
        run.rollup(resolution, statistic),
        roll_up(values, step, resolution, statistic=statistic, names=names),
    )

    np.testing.assert_array_equal(found.start, wanted.start)
    for field in ("count", "nonfinite", "minimum", "maximum"):
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field), err_msg=field)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-3)


def test_a_spike_of_one_step_is_in_every_rollup(run: RunReader) -> None:
    highest = run.grad_norms().max()

    for resolution in (10, 100, 1000, 10_000):
        assert run.grad_norms(resolution=resolution, aggregate="maximum").max().equals(highest.astype(float))


def test_rollups_that_are_missing_are_computed(run: RunReader) -> None:
    wanted = run.rollup(100)
    shutil.rmtree(run.path / "rollups")

    np.testing.assert_array_equal(RunReader(run.path).rollup(100).maximum, wanted.maximum)


def test_a_rollup_of_some_steps_holds_the_bins_that_touch_them(run: RunReader) -> None:
    assert run.rollup(100, steps=slice(150, 301)).start.tolist() == [100, 200, 300]


def test_what_is_not_finite_is_counted_and_not_averaged() -> None:
    values = np.array([[1.0, np.nan, NOT_MEASURED, 0.0], [100.0, np.inf, NOT_MEASURED, 0.0]], np.float32)

    rollup = roll_up(values, np.array([0, 1]), 10, statistic="grad_norm", names="abcd")

    assert rollup.count.tolist() == [[2, 2, 0, 2]]
    assert rollup.nonfinite.tolist() == [[0, 2, 0, 0]]
    np.testing.assert_allclose(rollup.mean, [[10.0, np.nan, np.nan, 0.0]])
    np.testing.assert_array_equal(rollup.maximum, [[100.0, np.nan, np.nan, 0.0]])


def test_coarser_rollups_are_those_of_the_values() -> None:
    rng = np.random.default_rng(0)
    values, steps = rng.lognormal(size=(500, 3)), np.sort(rng.choice(5000, 500, replace=False))

    once = coarser(roll_up(values, steps, 10, statistic="grad_norm", names="abc"), 1000)

    wanted = roll_up(values, steps, 1000, statistic="grad_norm", names="abc")
    np.testing.assert_allclose(once.mean, wanted.mean)
    np.testing.assert_array_equal(once.count, wanted.count)


def test_the_resolution_fits_the_picture(run: RunReader) -> None:
    assert [run.resolution_for(bins) for bins in (5000, 2345, 300, 20, 1)] == [1, 1, 10, 1000, 10_000]


# -- following, and from afar ------------------------------------------------------------------------------------------


def test_a_follower_sees_what_was_added(run_dir: Path) -> None:
    target = store_at(run_dir)
    target.append(batch_of(range(10)))
    reader = RunReader(run_dir)
    assert len(reader) == 10

    target.append(batch_of(range(10, 15)))
    reader.refresh()
    assert reader.steps.tolist() == list(range(15))
    target.end_segment()
    target.append(batch_of(range(15, 20)))
    target.seal()
    reader.refresh()
    assert len(reader.grad_norms()) == 20
    target.release()


def test_a_segment_sealed_behind_the_readers_back_is_found(run_dir: Path) -> None:
    target = store_at(run_dir)
    target.append(batch_of(range(10)))
    reader = RunReader(run_dir)
    target.finish("finished")
    target.release()

    assert len(reader.grad_norms()) == 10


@pytest.mark.needs("remote")
def test_a_run_behind_a_url_reads_the_same(run: RunReader) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(run.path), "/runs/far", recursive=True)

    far = RunReader("memory://runs/far")

    assert far.grad_norms().equals(run.grad_norms())
    np.testing.assert_array_equal(far.rollup(100).maximum, run.rollup(100).maximum)
    assert far.info.parameters == run.info.parameters
    memory.rm("/runs", recursive=True)


@pytest.mark.needs("remote")
def test_a_run_behind_a_url_that_is_still_written_reads_as_far_as_it_goes(run_dir: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    target = store_at(run_dir)
    target.append(batch_of(range(10)))
    memory.put(str(run_dir), "/open/run", recursive=True)

    far = RunReader("memory://open/run")

    assert far.info.status == "running"
    assert len(far.grad_norms()) == 10
    memory.rm("/open", recursive=True)
    target.release()


@pytest.mark.needs("remote")
def test_nothing_behind_a_url_is_not_found() -> None:
    with pytest.raises(RunNotFoundError, match="memory://nowhere does not exist"):
        RunReader("memory://nowhere")


# -- synthetic runs ----------------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_run() -> None:
    one, two = (list(synthetic_batches(steps=300, parameters=5, seed=3)) for _ in range(2))

    np.testing.assert_array_equal(one[0].grad_norm, two[0].grad_norm)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_can_be_written_and_read(run_dir: Path, scenario: str) -> None:
    norms = RunReader(write_run(run_dir, steps=400, parameters=6, scenario=scenario)).grad_norms()

    sick = norms.isna().any().any() or (norms == 0).any().any() or norms.max().max() > 30 or norms.min().min() < 1e-8
    assert sick == (scenario != "healthy")


def test_an_unknown_scenario_is_refused(run_dir: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown scenario 'explode'; did you mean 'exploding'"):
        write_run(run_dir, steps=10, parameters=2, scenario="explode")


def test_a_crashed_run_can_be_written(run_dir: Path) -> None:
    assert RunReader(write_run(run_dir, steps=10, parameters=2, status="running")).info.status == "crashed"


def test_names_with_dots_and_slashes_keep_their_columns(run_dir: Path) -> None:
    odd = tuple(Parameter(name) for name in ("a", "a.b", "a.b.c", "metric/a", "ünïcode λ"))
    target = store.Store(run_dir, RunInfo(odd))
    values = np.arange(10, dtype=np.float32).reshape(2, 5)
    target.append(StepBatch(odd, np.arange(2), values, {"a": np.ones(2), "a.b": np.zeros(2)}))
    target.finish("finished")
    target.release()

    reader = RunReader(run_dir)

    assert reader.grad_norms().to_numpy().tolist() == values.tolist()
    assert reader.metrics()[["a", "a.b"]].to_numpy().tolist() == [[1.0, 0.0]] * 2
