import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.casework.case import Training
from benchmarks.casework.recording import joined, plain, watched
from benchmarks.casework.scenarios import SCENARIOS
from gradwatch.records import NOT_MEASURED, Parameter, Samples, StepBatch

STEPS = 41


def training(name: str) -> Training:
    torch.manual_seed(0)
    return dataclasses.replace(SCENARIOS[name].build(0), steps=STEPS)


@pytest.mark.parametrize("name", ["heavy-tailed-regression", "gan-digits", "alternating-heads", "rnn-relu-identity"])
def test_the_watcher_records_what_an_independent_recorder_measures(name: str) -> None:
    record, losses = watched(training(name))
    reference, same_losses = plain(training(name))
    np.testing.assert_array_equal(losses, same_losses)
    np.testing.assert_array_equal(record.metric("loss"), losses)
    assert [p.name for p in record.parameters] == [p.name for p in reference.parameters]
    np.testing.assert_allclose(record.grad_norm, reference.grad_norm, rtol=1e-4)
    ours, theirs = (batch.statistics["weight_norm"] for batch in (record, reference))
    np.testing.assert_array_equal(ours.rows, theirs.rows)
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-4)


def test_joined_batches_are_the_batch_they_were_cut_from() -> None:
    whole = StepBatch(
        parameters=(Parameter("fc.weight"),),
        step=np.arange(6),
        grad_norm=np.arange(6, dtype=np.float32)[:, None],
        metrics={"loss": np.arange(6.0)},
        statistics={"weight_norm": Samples(np.array([0, 3, 5]), np.ones((3, 1), np.float32))},
    )
    again = joined(list(whole.split(2)))
    np.testing.assert_array_equal(again.grad_norm, whole.grad_norm)
    np.testing.assert_array_equal(again.statistics["weight_norm"].rows, [0, 3, 5])


def test_a_metric_that_one_batch_lacks_is_not_measured_there() -> None:
    first, second = (
        StepBatch((Parameter("w"),), np.array([k]), np.ones((1, 1), np.float32), metrics)
        for k, metrics in enumerate(({"loss": np.array([2.0])}, {"lr": np.array([0.1])}))
    )
    assert joined([first, second]).metrics["loss"].tolist() == [2.0, NOT_MEASURED]
