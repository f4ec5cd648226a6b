"""What the writer was given is what the reader gives back."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.reader import RunReader
from gradwatch.records import NOT_MEASURED, Parameter, RunInfo, StepBatch
from gradwatch.storage.batches import join, select
from gradwatch.storage.layout import Layout
from gradwatch.storage.store import Store
from gradwatch.writer import RunWriter
from tests.record.building import PARAMETERS, QuickDisk, assert_same, batch_of, batches, dense, store_at


def read(path: Path) -> StepBatch:
    """The whole run, which has one layout."""
    parts = list(RunReader(path).batches(10**9))
    layout = Layout.of(parts[0])
    for part in parts:
        layout = layout.joined(Layout.of(part)) or layout
    return join(parts, layout)


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
@given(batch=batches(), cuts=st.sets(st.integers(1, 11)))
def test_any_batch_comes_back_to_the_bit(sealed: bool, batch: StepBatch, cuts: set[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(batch)), len(batch)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "run", RunInfo(batch.parameters), disk=QuickDisk())
        for low, high in pairwise(edges):
            store.append(batch[low:high])
        if sealed:
            store.finish("finished")
        store.release()

        assert_same(read(Path(folder) / "run"), batch)


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
@given(batch=batches(most=9), data=st.data())
@settings(max_examples=25)
def test_a_prefix_of_the_bytes_reads_as_a_prefix_of_the_steps(
    sealed: bool, batch: StepBatch, data: st.DataObject
) -> None:
    """Law 5: the bytes of a run are those of its sealed segments, then those of the open one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        store = Store(path, RunInfo(batch.parameters), disk=QuickDisk())
        half = len(batch) // 2
        if sealed and half:
            store.append(batch[:half])
            store.end_segment()
            store.seal()
        ends = []
        for row in range(half if sealed else 0, len(batch)):
            store.append(batch[row : row + 1])
            ends.append(store._open.size if store._open else 0)
        store.release()
        stream = max((path / "steps").glob("*.arrow"))
        cut = data.draw(st.integers(0, stream.stat().st_size))
        stream.write_bytes(stream.read_bytes()[:cut])

        kept = (half if sealed else 0) + sum(end <= cut for end in ends)
        reader = RunReader(path)

        assert len(reader) == kept
        if kept:
            assert_same(read(path), batch[:kept])


def test_single_rows_come_back_as_written(run_dir: Path) -> None:
    whole = batch_of(range(130), stats_every=10)
    with_writer(run_dir, [whole[i : i + 1] for i in range(130)])

    assert_same(read(run_dir), whole)


def with_writer(path: Path, parts: list[StepBatch], **settings: bool) -> None:
    writer = RunWriter(path, RunInfo(PARAMETERS), **settings)
    for part in parts:
        writer.write(part)
    writer.close()


def test_batches_are_cut_to_the_size_asked_for(run_dir: Path) -> None:
    with_writer(run_dir, [batch_of(range(25))])

    assert [len(batch) for batch in RunReader(run_dir).batches(10)] == [10, 10, 5]


def test_batches_of_a_range_hold_its_steps(run_dir: Path) -> None:
    with_writer(run_dir, [batch_of(range(25))])

    assert [batch.step.tolist() for batch in RunReader(run_dir).batches(steps=slice(20, 23))] == [[20, 21, 22]]


def test_a_replay_reads_only_the_statistics_asked_for(run_dir: Path) -> None:
    with_writer(run_dir, [batch_of(range(20), stats_every=5)])

    assert list(next(RunReader(run_dir).batches(statistics=["weight_norm"])).statistics) == ["weight_norm"]


def test_a_new_metric_begins_a_segment_and_is_absent_before(run_dir: Path) -> None:
    store = store_at(run_dir)
    store.append(batch_of(range(5)))
    store.append(batch_of(range(5, 9), metrics=("loss", "lr", "accuracy")))
    store.finish("finished")
    store.release()

    accuracy = RunReader(run_dir).metrics()["accuracy"]

    assert accuracy.isna().tolist() == [True] * 5 + [False] * 4
    assert len(list((run_dir / "steps").iterdir())) == 2


def test_a_metric_that_comes_and_goes_begins_no_further_segment(run_dir: Path) -> None:
    rare = [batch_of([i], metrics=("loss", "rare") if i % 10 == 5 else ("loss",)) for i in range(100)]
    store = store_at(run_dir)
    for part in rare:
        store.append(part)
    store.finish("finished")
    store.release()

    assert len(list((run_dir / "steps").iterdir())) == 2


def test_parameters_may_be_added_in_the_middle_of_a_run(run_dir: Path) -> None:
    more = (*PARAMETERS, Parameter("head.weight", shape=(3, 2), depth=3))
    with_writer(run_dir, [batch_of(range(5)), batch_of(range(5, 9), parameters=more)])

    reader = RunReader(run_dir)

    assert reader.info.parameters == more
    assert reader.grad_norms()["head.weight"].isna().tolist() == [True] * 5 + [False] * 4
    assert [len(batch.parameters) for batch in reader.batches()] == [6, 7]


def test_parameters_may_go_in_the_middle_of_a_run(run_dir: Path) -> None:
    with_writer(run_dir, [batch_of(range(5)), batch_of(range(5, 9), parameters=PARAMETERS[:2])])

    norms = RunReader(run_dir).grad_norms()

    assert norms.isna().sum().tolist() == [0, 0, 4, 4, 4, 4]


def test_steps_may_have_gaps(run_dir: Path) -> None:
    with_writer(run_dir, [batch_of([0, 3, 10]), batch_of([11, 500])])

    assert RunReader(run_dir).steps.tolist() == [0, 3, 10, 11, 500]


def test_a_model_without_parameters_keeps_its_metrics(run_dir: Path) -> None:
    with_writer(run_dir, [batch_of(range(5), parameters=())])

    assert RunReader(run_dir).metrics()["loss"].notna().all()


def test_joining_and_selecting_keep_the_samples_at_their_steps() -> None:
    whole = batch_of(range(40), stats_every=4)
    rows = np.array([0, 4, 5, 8, 39])

    picked = select(join([whole[:7], whole[7:30], whole[30:]], Layout.of(whole)), rows)

    np.testing.assert_array_equal(dense(picked, "weight_norm"), dense(whole, "weight_norm")[rows])
    assert picked.step.tolist() == rows.tolist()


def test_what_is_not_measured_is_nan_in_tables(run_dir: Path) -> None:
    batch = batch_of(range(3))
    batch.grad_norm[1, 2] = NOT_MEASURED
    with_writer(run_dir, [batch])

    assert RunReader(run_dir).grad_norms().isna().sum().sum() == 1
