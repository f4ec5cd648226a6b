"""Short campaigns of `benchmarks/crash.py`: whatever happens to the process, the disk or the power, the run reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import crash
from gradwatch.reader import RunReader
from gradwatch.records import RunInfo
from gradwatch.storage import trouble
from gradwatch.writer import RunWriter


def assert_clean(outcome: crash.Outcome, *, rounds: int) -> None:
    assert outcome.notes == []
    assert outcome.is_clean
    assert outcome.rounds >= rounds


def test_kills_at_random_moments_lose_at_most_the_unflushed_tail(tmp_path: Path) -> None:
    outcome = crash.kill_campaign(10, folder=tmp_path)

    assert_clean(outcome, rounds=10)
    # Rows are flushed at every 25th; the rest is the time that a loaded machine takes to wake a thread.
    assert outcome.longest_tail <= 4 * crash.FLUSH_EVERY


def test_kills_at_any_operation_lose_nothing_that_was_recorded(tmp_path: Path) -> None:
    assert_clean(crash.kill_campaign(30, folder=tmp_path, at_operations=True), rounds=30)


def test_a_disk_that_fails_costs_no_step_once_it_works_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_clean(crash.fault_campaign(8, tmp_path), rounds=8)
    assert "training goes on, and the writer tries again" in caplog.text


def test_a_power_cut_loses_nothing_that_was_synced(tmp_path: Path) -> None:
    assert_clean(crash.power_campaign(12, tmp_path), rounds=12)


def test_a_stream_cut_anywhere_in_its_last_batch_loses_that_batch(run_dir: Path) -> None:
    crash.write_steps(run_dir.with_name("shorter"), 39, seal_at=1000)
    last = next((run_dir.with_name("shorter") / "steps").iterdir()).stat().st_size
    crash.write_steps(run_dir, 40, seal_at=1000)
    stream = next((run_dir / "steps").iterdir())
    content = stream.read_bytes()
    for size in range(last, len(content)):
        stream.write_bytes(content[:size])

        assert len(RunReader(run_dir)) == 39


@pytest.mark.parametrize("name", ["run.json", "events.jsonl", "steps", "samples", "rollups"])
def test_a_damaged_file_costs_no_more_than_itself(run_dir: Path, name: str) -> None:
    crash.write_steps(run_dir, 320, seal_at=150)
    file = run_dir / name
    if file.is_dir():
        file = min(file.glob("*.parquet"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    reader = RunReader(run_dir)

    assert len(reader) == (170 if name == "steps" else 320)
    assert len(reader.grad_norms()) == len(reader)
    assert reader.rollup(10).maximum.shape == (32, 20)
    assert sum(len(batch) for batch in reader.batches()) == len(reader)


def test_damage_is_listed(run_dir: Path) -> None:
    crash.write_steps(run_dir, 320, seal_at=150)
    min((run_dir / "steps").glob("*.parquet")).write_bytes(b"PAR1 no more")

    reader = RunReader(run_dir)

    assert len(reader) == 170
    assert list(reader.damage) == ["000000-000000000000"]


def test_a_run_without_its_facts_still_tells_its_parameters(run_dir: Path) -> None:
    crash.write_steps(run_dir, 20, seal_at=1000)
    (run_dir / "run.json").write_text("")

    reader = RunReader(run_dir)

    assert [p.name for p in reader.info.parameters] == [p.name for p in crash.PARAMETERS]
    assert reader.info.status == "crashed"


def test_a_flipped_bit_is_not_read_as_a_number(run_dir: Path) -> None:
    crash.write_steps(run_dir, 40, seal_at=1000)
    stream = next((run_dir / "steps").iterdir())
    content = stream.read_bytes()
    for place in range(len(content) - 1200, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        stream.write_bytes(damaged)

        step, norms, _ = RunReader(run_dir).values()

        assert step.tolist() == list(range(len(step)))
        np.testing.assert_array_equal(norms, crash.norms_of(step))


def test_the_steps_that_were_not_recorded_are_marked(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwatch.writer.MAX_WAITING", 20_000)
    monkeypatch.setattr(trouble, "FIRST_RETRY", 0.2)
    disk = type("Full", (crash.FailingDisk,), {"failing": range(6, 8), "count": 0})
    monkeypatch.setattr(RunWriter, "disk_type", disk)
    writer = RunWriter(run_dir, RunInfo(crash.PARAMETERS), flush_every=1, flush_seconds=0.01)
    for step in range(2000):
        writer.write(crash.row_of(step))
    writer.close()

    reader = RunReader(run_dir)
    marks = [mark for mark in reader.marks() if mark["name"] == "thinned"]

    assert writer.dropped_steps > 0
    assert len(reader) + writer.dropped_steps == 2000
    assert sum(mark["dropped"] for mark in marks) == writer.dropped_steps
    assert json.loads((run_dir / "run.json").read_text())["overhead"]["dropped_steps"] == writer.dropped_steps
