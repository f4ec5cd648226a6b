"""Batches and runs for the tests of the record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradwatch.records import NOT_MEASURED, Parameter, RunInfo, Samples, StepBatch
from gradwatch.storage.disk import Disk
from gradwatch.storage.store import Store

PARAMETERS = tuple(
    Parameter(f"layers.{i}.{kind}", layer=f"layers.{i}", depth=i) for i in range(3) for kind in ("weight", "bias")
)
MODULES = ("act.0", "act.1")


def batch_of(
    steps: Sequence[int],
    *,
    parameters: tuple[Parameter, ...] = PARAMETERS,
    metrics: Sequence[str] = ("loss", "lr"),
    stats_every: int = 0,
    seed: int = 0,
) -> StepBatch:
    """Steps whose every number depends on the step and the seed alone, however they are cut."""
    rngs = [np.random.default_rng([seed, step]) for step in steps]
    rows = np.array([i for i, step in enumerate(steps) if stats_every and step % stats_every == 0], np.int64)
    width = len(parameters)

    def sample(columns: int) -> Samples:
        values = [np.random.default_rng([seed + 1, steps[row]]).lognormal(size=columns) for row in rows]
        return Samples(rows, np.array(values, np.float32).reshape(len(rows), columns))

    statistics = {"weight_norm": sample(width), "activation_mean": sample(len(MODULES))} if len(rows) else {}
    return StepBatch(
        parameters=parameters,
        step=np.array(steps, np.int64),
        grad_norm=np.array([rng.lognormal(size=width) for rng in rngs], np.float32).reshape(len(steps), width),
        metrics={name: np.array([rng.normal() for rng in rngs]) for name in metrics},
        statistics=statistics,
        modules=MODULES if stats_every else (),
        stage=np.array([step % 2 for step in steps], np.int8),
        skip_reason=np.array([step % 3 for step in steps], np.int8),
    )


def store_at(path: Path, *, resume: bool | int = False, overwrite: bool = False) -> Store:
    """A store without a thread."""
    return Store(path, RunInfo(PARAMETERS), resume=resume, overwrite=overwrite)


def assert_same(found: StepBatch, wanted: StepBatch) -> None:
    """The same steps, to the bit; NaN equals NaN, and what is absent equals `NOT_MEASURED`."""
    np.testing.assert_array_equal(found.step, wanted.step)
    assert [p.name for p in found.parameters] == [p.name for p in wanted.parameters]
    np.testing.assert_array_equal(found.grad_norm, wanted.grad_norm)
    assert found.grad_norm.dtype == np.float32
    for name in {*found.metrics, *wanted.metrics}:
        np.testing.assert_array_equal(found.metric(name), wanted.metric(name), err_msg=name)
    for name in {*found.statistics, *wanted.statistics}:
        np.testing.assert_array_equal(dense(found, name), dense(wanted, name), err_msg=name)
    np.testing.assert_array_equal(found.stage, wanted.stage)
    np.testing.assert_array_equal(found.skip_reason, wanted.skip_reason)


def dense(batch: StepBatch, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A sampled statistic with a row for every step, or one row of nothing."""
    samples = batch.statistics.get(name)
    if samples is None or not len(samples.rows):
        return np.full((len(batch), 1), NOT_MEASURED, np.float32)
    values = np.full((len(batch), samples.values.shape[1]), NOT_MEASURED, np.float32)
    values[samples.rows] = samples.values
    return values


class QuickDisk(Disk):
    """Does not wait for the disk, for tests that write many runs."""

    def sync(self, file: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass

    def replace(self, path: Path, data: Any) -> None:
        path.write_bytes(data)


#: What a gradient norm may be, the awkward values often.
norms = st.one_of(
    st.floats(0, 2.0**127, width=32),
    st.sampled_from([0.0, 1e-45, 3.4e38, np.nan, np.inf, NOT_MEASURED]),
)
numbers = st.one_of(st.floats(), st.sampled_from([np.nan, np.inf, NOT_MEASURED]))
#: Names that could be taken for a column of something else.
names = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(["step", "stage", "skip_reason", "grad_norm", "metric/loss", "grad_norm/x", "a.b", "a"]),
).filter(lambda name: name.isprintable())


@st.composite
def batches(draw: st.DrawFn, *, most: int = 12) -> StepBatch:
    """Any steps that a writer may be given."""
    n = draw(st.integers(1, most))
    width = draw(st.integers(0, 4))
    labels = draw(st.lists(names, min_size=width, max_size=width, unique=True))
    gaps = draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n))
    metrics = draw(st.lists(names, max_size=3, unique=True))
    rows = sorted(draw(st.sets(st.integers(0, n - 1))))
    statistics = {}
    if rows and width:
        values = draw(hnp.arrays(np.float32, (len(rows), width), elements=norms))
        statistics["weight_norm"] = Samples(np.array(rows, np.int64), values)
    return StepBatch(
        parameters=tuple(Parameter(label) for label in labels),
        step=np.cumsum(gaps, dtype=np.int64) - 1,
        grad_norm=draw(hnp.arrays(np.float32, (n, width), elements=norms)),
        metrics={name: draw(hnp.arrays(np.float64, n, elements=numbers)) for name in metrics},
        statistics=statistics,
        stage=np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), np.int8),
        skip_reason=np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.int8),
    )
