import numpy as np

from gradwatch.records import NOT_MEASURED, Parameter, StepBatch
from gradwatch.rows import Rows

PARAMETERS = (Parameter("a"), Parameter("b"))


def test_rows_come_back_as_one_batch_in_order() -> None:
    rows = Rows(PARAMETERS, capacity=3)
    for step in (4, 5, 6):
        rows.add(step, np.array([step, 1.0]), {"loss": float(step)}, stage=step == 5, skip_reason=2 * (step == 6))

    assert rows.is_full
    batch = rows.take()

    assert list(batch.step) == [4, 5, 6]
    np.testing.assert_array_equal(batch.grad_norm, [[4, 1], [5, 1], [6, 1]])
    np.testing.assert_array_equal(batch.metric("loss"), [4.0, 5.0, 6.0])
    assert list(batch.stage) == [0, 1, 0]
    assert list(batch.skip_reason) == [0, 0, 2]
    assert len(rows) == 0


def test_metric_known_at_some_steps_only_is_not_measured_at_others() -> None:
    rows = Rows(PARAMETERS, capacity=2)
    rows.add(0, np.ones(2), {})
    rows.add(1, np.ones(2), {"accuracy": 0.5})

    assert list(rows.take().metric("accuracy")) == [NOT_MEASURED, 0.5]


def test_norms_of_fewer_parameters_leave_the_rest_unmeasured() -> None:
    rows = Rows(PARAMETERS)
    rows.add(0, np.array([2.0]), {})

    np.testing.assert_array_equal(rows.take().grad_norm, [[2.0, NOT_MEASURED]])


def test_samples_carry_the_rows_they_were_taken_at() -> None:
    rows = Rows(PARAMETERS, modules=("act",), capacity=3)
    rows.add(0, np.ones(2), {})
    rows.add(1, np.ones(2), {}, statistics={"weight_norm": np.array([3.0, 4.0]), "dead_fraction": np.array([0.25])})
    rows.add(2, np.ones(2), {}, statistics={"weight_norm": np.array([5.0, 6.0])})

    statistics = rows.take().statistics

    assert list(statistics["weight_norm"].rows) == [1, 2]
    np.testing.assert_array_equal(statistics["weight_norm"].values, [[3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_array_equal(statistics["dead_fraction"].values, [[0.25]])


def test_a_taken_batch_keeps_its_arrays() -> None:
    rows = Rows(PARAMETERS)
    rows.add(0, np.array([1.0, 1.0]), {})
    batch = rows.take()
    rows.add(1, np.array([9.0, 9.0]), {})

    np.testing.assert_array_equal(batch.grad_norm, [[1.0, 1.0]])


def test_news_come_once_and_again_with_the_batch() -> None:
    rows = Rows(PARAMETERS, capacity=4)
    rows.add(0, np.ones(2), {})
    told: list[list[int]] = []

    def put(batch: StepBatch) -> None:
        told.append(list(batch.step))

    rows.tell(put)
    rows.add(1, np.ones(2), {})
    rows.tell(put)
    rows.tell(put)

    assert told == [[0], [1]]
    assert list(rows.take().step) == [0, 1]


def test_global_norm_is_filled_in_the_same_for_one_step_as_for_many() -> None:
    norms = np.random.default_rng(0).lognormal(0, 3, (8, 2)).astype(np.float32)
    norms[3] = NOT_MEASURED
    norms[4, 1] = NOT_MEASURED
    together, alone = Rows(PARAMETERS, capacity=8), Rows(PARAMETERS)
    found = []
    for step, norm in enumerate(norms):
        together.add(step, norm, {})
        alone.add(step, norm, {})
        found += alone.take().metric("global_norm").tolist()

    assert together.take().metric("global_norm").tolist() == found
    assert found[3] == NOT_MEASURED
    assert found[4] == norms[4, 0]
