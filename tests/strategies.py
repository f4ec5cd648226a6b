"""Hypothesis strategies for what flows through gradwatch."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradwatch.records import (
    METRICS,
    NOT_MEASURED,
    PARAMETER_STATISTICS,
    RULES,
    SEVERITIES,
    SKIP_REASONS,
    STAGES,
    ActionRecord,
    Finding,
    Floats,
    Parameter,
    RunInfo,
    Samples,
    StepBatch,
)

names = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=8)
texts = st.text(max_size=20)
counts = st.integers(0, 10**9)
#: JSON types as they come back from a file.
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | counts | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
#: A norm as a record holds it: finite and not negative, or what a broken gradient has, or not measured.
norms = st.floats(0, 2.0**60, width=32) | st.sampled_from([np.nan, np.inf, NOT_MEASURED])


def parameters(min_size: int = 1, max_size: int = 8) -> st.SearchStrategy[tuple[Parameter, ...]]:
    """Parameters of a model: names differ, the parameters of one layer have one depth."""

    @st.composite
    def draw_parameters(draw: st.DrawFn) -> tuple[Parameter, ...]:
        layers = draw(st.lists(names, min_size=1, max_size=4, unique=True))
        depths = draw(st.permutations(range(len(layers))))
        owners = draw(st.lists(st.sampled_from(range(len(layers))), min_size=min_size, max_size=max_size))
        shape = st.lists(st.integers(1, 9), max_size=3).map(tuple)
        return tuple(
            Parameter(f"{layers[o]}.p{i}", shape=draw(shape), depth=depths[o], trainable=draw(st.booleans()))
            for i, o in enumerate(owners)
        )

    return draw_parameters()


def norm_arrays(rows: int, columns: int) -> st.SearchStrategy[Floats]:
    """float32 arrays of norms, shape (rows, columns)."""
    return hnp.arrays(np.float32, (rows, columns), elements=norms)


@st.composite
def step_batches(draw: st.DrawFn, max_steps: int = 12) -> StepBatch:
    """Batches with gaps between steps, sampled statistics, metrics, stages and skips."""
    columns = draw(parameters())
    n = draw(st.integers(0, max_steps))
    gaps = draw(hnp.arrays(np.int64, n, elements=st.integers(1, 5)))
    metric = hnp.arrays(np.float64, n, elements=st.floats())
    return StepBatch(
        parameters=columns,
        step=np.cumsum(gaps),
        grad_norm=draw(norm_arrays(n, len(columns))),
        metrics=draw(st.dictionaries(st.sampled_from(METRICS) | names, metric, max_size=3)),
        statistics={
            name: draw(_samples(n, len(columns)))
            for name in draw(st.sets(st.sampled_from(PARAMETER_STATISTICS[1:]), max_size=2))
        },
        stage=draw(hnp.arrays(np.int8, n, elements=st.integers(0, len(STAGES) - 1))),
        skip_reason=draw(hnp.arrays(np.int8, n, elements=st.integers(0, len(SKIP_REASONS) - 1))),
    )


@st.composite
def _samples(draw: st.DrawFn, n: int, columns: int) -> Samples:
    rows = np.flatnonzero(draw(hnp.arrays(np.bool_, n)))
    return Samples(rows=rows, values=draw(norm_arrays(len(rows), columns)))


findings = st.builds(
    Finding,
    id=texts,
    rule=st.sampled_from(RULES),
    severity=st.sampled_from(SEVERITIES),
    first_step=counts,
    last_step=counts,
    layers=st.lists(names, max_size=3).map(tuple),
    parameters=st.lists(names, max_size=3).map(tuple),
    value=st.floats(),
    threshold=st.floats(),
    message=texts,
    evidence=st.dictionaries(texts, json_values, max_size=3),
    cause=texts,
    advice=st.lists(texts, max_size=3).map(tuple),
    resolved_step=st.none() | counts,
)

action_records = st.builds(
    ActionRecord,
    id=texts,
    step=counts,
    action=names,
    layers=st.lists(names, max_size=3).map(tuple),
    detail=texts,
    reason=st.sampled_from(RULES),
    finding=texts,
    before=st.floats(),
    after=st.floats(),
    outcome=texts,
    dry_run=st.booleans(),
)

run_infos = st.builds(
    RunInfo,
    parameters=parameters(min_size=0),
    modules=st.lists(names, max_size=3).map(tuple),
    status=st.sampled_from(["running", "finished", "crashed"]),
    status_detail=texts,
    started=st.floats(0, 1e10),
    heartbeat=st.floats(0, 1e10),
    ended=st.none() | st.floats(0, 1e10),
    framework=names,
    versions=st.dictionaries(names, texts, max_size=3),
    host=texts,
    pid=counts,
    rank=counts,
    world_size=counts,
    config=st.dictionaries(texts, json_values, max_size=3),
    overhead=st.dictionaries(texts, json_values, max_size=3),
)
