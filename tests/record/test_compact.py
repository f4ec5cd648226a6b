"""Compacting keeps what counts: all rollups, and full resolution where it was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradwatch.compact import Keep, compact_run
from gradwatch.errors import ConfigurationError, RunLockedError, RunNotFoundError
from gradwatch.reader import RunReader
from gradwatch.records import Finding
from gradwatch.storage import store
from gradwatch.testing import write_run
from tests.record.building import batch_of, store_at


@pytest.fixture
def run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """5,000 steps in five segments, with a finding at step 2,500."""
    monkeypatch.setattr(store, "SEAL_ROWS", 1000)
    finding = Finding("spike-2500", "spike", "warning", 2500, 2500)
    return write_run(
        run_dir, steps=5000, parameters=4, scenario="spike", statistics=["weight_norm"], findings=[finding]
    )


def test_retention_keeps_the_ends_and_the_neighbourhood_of_findings(run: Path) -> None:
    compact_run(run, keep=Keep(last=300, around=100, first=200))

    kept = set(RunReader(run).steps.tolist())

    assert set(range(200)) | set(range(2400, 2601)) | set(range(4700, 5000)) <= kept
    assert len(kept) < 750


def test_retention_loses_nothing_of_the_rollups(run: Path) -> None:
    before = [RunReader(run).rollup(100, statistic) for statistic in ("grad_norm", "weight_norm", "metric")]

    compact_run(run, keep=100)

    after = [RunReader(run).rollup(100, statistic) for statistic in ("grad_norm", "weight_norm", "metric")]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new.start, old.start)
        np.testing.assert_array_equal(new.maximum, old.maximum)
        np.testing.assert_array_equal(new.count, old.count)


def test_retention_makes_the_run_smaller(run: Path) -> None:
    numbers = compact_run(run, keep=100)

    assert numbers["bytes_after"] < numbers["bytes_before"] * 0.7
    assert numbers["steps_before"] == 5000


def test_compacting_twice_changes_nothing_more(run: Path) -> None:
    compact_run(run, keep=Keep(last=300))
    once = {file: file.read_bytes() for file in run.rglob("*.parquet")}

    compact_run(run, keep=Keep(last=300))

    assert {file: file.read_bytes() for file in run.rglob("*.parquet")} == once


def test_without_a_policy_every_step_stays(run: Path) -> None:
    assert compact_run(run)["steps_after"] == 5000


def test_what_a_killed_process_left_open_is_sealed(run_dir: Path) -> None:
    killed = store_at(run_dir)
    killed.append(batch_of(range(30)))
    killed.release()

    compact_run(run_dir)

    assert [file.suffix for file in (run_dir / "steps").iterdir()] == [".parquet"]
    assert len(RunReader(run_dir)) == 30


def test_superseded_steps_are_dropped(run_dir: Path) -> None:
    first = store_at(run_dir)
    first.append(batch_of(range(30)))
    first.finish("crashed")
    first.release()
    second = store_at(run_dir, resume=20)
    second.append(batch_of(range(20, 40), seed=1))
    second.finish("finished")
    second.release()
    wanted = RunReader(run_dir).grad_norms()

    compact_run(run_dir)

    reader = RunReader(run_dir)
    assert reader.grad_norms().equals(wanted)
    assert sum(segment.count for _, segment, _ in reader._catalog.readable()) == 40


def test_missing_rollups_are_rebuilt(run: Path) -> None:
    wanted = RunReader(run).rollup(1000)
    for file in (run / "rollups").iterdir():
        file.unlink()

    compact_run(run)

    assert len(list((run / "rollups").iterdir())) == 5
    np.testing.assert_array_equal(RunReader(run).rollup(1000).maximum, wanted.maximum)


def test_a_run_that_is_being_written_is_left_alone(run_dir: Path) -> None:
    alive = store_at(run_dir)

    with pytest.raises(RunLockedError, match="is being written by process"):
        compact_run(run_dir)
    alive.release()


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'last' must be >= 0: -1"):
        Keep(last=-1)


def test_compacting_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no directory"):
        compact_run(tmp_path / "missing")
