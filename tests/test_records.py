"""The laws of the data that every stage passes on."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradwatch.records import (
    NOT_MEASURED,
    ActionRecord,
    Finding,
    Layers,
    Parameter,
    RunInfo,
    Samples,
    StepBatch,
)
from tests import strategies


def through_a_file(data: dict[str, Any]) -> dict[str, Any]:
    """As strict JSON text and back; NaN or Infinity in the text would be no JSON."""
    loaded: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return loaded


def assert_same_batch(actual: StepBatch, expected: StepBatch) -> None:
    assert actual.parameters == expected.parameters
    for name in ("step", "grad_norm", "stage", "skip_reason"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), strict=True)
    assert actual.metrics.keys() == expected.metrics.keys()
    for name, values in expected.metrics.items():
        np.testing.assert_array_equal(actual.metrics[name], values, strict=True)
    assert actual.statistics.keys() == expected.statistics.keys()
    for name, samples in expected.statistics.items():
        np.testing.assert_array_equal(actual.statistics[name].rows, samples.rows, strict=True)
        np.testing.assert_array_equal(actual.statistics[name].values, samples.values, strict=True)


def concatenated(pieces: list[StepBatch], like: StepBatch) -> StepBatch:
    """The pieces as one batch, by a way of its own: rows are counted on from piece to piece."""
    starts = np.cumsum([0, *map(len, pieces)])

    def joined(name: str) -> Samples:
        of = [piece.statistics[name] for piece in pieces]
        rows = [samples.rows + start for samples, start in zip(of, starts, strict=False)]
        return Samples(np.concatenate(rows), np.concatenate([samples.values for samples in of]))

    return dataclasses.replace(
        like,
        step=np.concatenate([piece.step for piece in pieces]),
        grad_norm=np.concatenate([piece.grad_norm for piece in pieces]),
        metrics={name: np.concatenate([piece.metrics[name] for piece in pieces]) for name in like.metrics},
        statistics={name: joined(name) for name in like.statistics},
        stage=np.concatenate([piece.stage for piece in pieces]),
        skip_reason=np.concatenate([piece.skip_reason for piece in pieces]),
    )


class TestParameter:
    @pytest.mark.parametrize(("name", "layer"), [("a.b.weight", "a.b"), ("scale", "scale")])
    def test_the_layer_is_the_name_without_its_last_part(self, name: str, layer: str) -> None:
        assert Parameter(name).layer == layer

    def test_a_given_layer_is_kept(self) -> None:
        assert Parameter("a.weight", layer="block").layer == "block"

    @pytest.mark.parametrize(("shape", "size"), [((), 1), ((3,), 3), ((64, 3, 7, 7), 9408), ((0, 5), 0)])
    def test_the_size_is_the_product_of_the_shape(self, shape: tuple[int, ...], size: int) -> None:
        assert Parameter("w", shape=shape).size == size

    def test_a_shape_of_numpy_integers_becomes_plain_integers(self) -> None:
        shape = Parameter("w", shape=tuple(np.array([2, 3]))).shape

        assert [type(n) for n in shape] == [int, int]


class TestLayers:
    def test_names_go_from_input_to_output_whatever_the_order_of_the_parameters(self) -> None:
        layers = Layers([Parameter("head.w", depth=2), Parameter("stem.w", depth=0), Parameter("body.w", depth=1)])

        assert layers.names == ("stem", "body", "head")
        assert layers.of_parameter.tolist() == [2, 0, 1]
        assert layers.depth.tolist() == [0, 1, 2]

    def test_layers_of_equal_depth_keep_the_order_of_definition(self) -> None:
        assert Layers([Parameter("b.w"), Parameter("a.w")]).names == ("b", "a")

    def test_no_parameters_make_no_layers(self) -> None:
        assert Layers([]).norms(np.empty((3, 0))).shape == (3, 0)

    @given(st.data())
    def test_a_norm_is_the_root_of_the_sum_of_squares_of_the_measured_parameters(self, data: st.DataObject) -> None:
        parameters = data.draw(strategies.parameters())
        norms = data.draw(strategies.norm_arrays(data.draw(st.integers(0, 4)), len(parameters)))
        layers = Layers(parameters)

        actual = layers.norms(norms)

        for column, name in enumerate(layers.names):
            own = norms[:, [p.layer == name for p in parameters]].astype(np.float64)
            for row, values in enumerate(own):
                measured = values[values != NOT_MEASURED]
                expected = np.sqrt(np.sum(measured**2)) if len(measured) else NOT_MEASURED
                np.testing.assert_allclose(actual[row, column], expected, rtol=1e-12)

    @given(strategies.step_batches(), st.floats(1e-6, 1e6))
    def test_scaling_the_gradients_scales_the_norms(self, batch: StepBatch, factor: float) -> None:
        layers = Layers(batch.parameters)
        norms = batch.grad_norm.astype(np.float64)

        np.testing.assert_allclose(layers.norms(norms * factor), layers.norms(norms) * factor, rtol=1e-12)

    def test_large_float32_norms_do_not_overflow(self) -> None:
        norms = np.full((1, 2), 3e38, np.float32)

        assert Layers([Parameter("a.w"), Parameter("a.b")]).norms(norms) == pytest.approx(3e38 * np.sqrt(2))


class TestStepBatch:
    @given(strategies.step_batches(), st.integers(1, 15))
    def test_the_pieces_of_a_split_concatenate_to_the_batch(self, batch: StepBatch, size: int) -> None:
        pieces = list(batch.split(size))
        assume(pieces)

        assert all(len(piece) <= size for piece in pieces)
        assert_same_batch(concatenated(pieces, batch), batch)

    @given(strategies.step_batches(), st.integers(-15, 15))
    def test_the_two_sides_of_a_cut_concatenate_to_the_batch(self, batch: StepBatch, cut: int) -> None:
        assert_same_batch(concatenated([batch[:cut], batch[cut:]], batch), batch)

    @given(strategies.step_batches(), st.integers(0, 12), st.integers(0, 12))
    def test_a_slice_of_a_slice_is_a_slice(self, batch: StepBatch, start: int, skip: int) -> None:
        assert_same_batch(batch[start:][skip:], batch[start + skip :])

    def test_an_empty_batch_splits_into_nothing(self) -> None:
        batch = StepBatch((Parameter("w"),), step=np.empty(0, np.int64), grad_norm=np.empty((0, 1), np.float32))

        assert list(batch.split(3)) == []

    def test_a_metric_that_nobody_logged_is_not_measured(self) -> None:
        batch = StepBatch((Parameter("w"),), step=np.arange(2), grad_norm=np.ones((2, 1), np.float32))

        assert batch.metric("accuracy").tolist() == [NOT_MEASURED, NOT_MEASURED]

    def test_stages_and_skips_have_a_row_for_every_step_when_none_are_given(self) -> None:
        batch = StepBatch((Parameter("w"),), step=np.arange(2), grad_norm=np.ones((2, 1), np.float32))

        assert batch.stage.tolist() == [0, 0]
        assert batch.skip_reason.tolist() == [0, 0]


def same(actual: object, expected: object) -> bool:
    """Equal field by field, NaN being NaN."""
    return repr(actual) == repr(expected) and type(actual) is type(expected)


class TestJson:
    @given(strategies.findings)
    def test_a_finding_comes_back_from_a_file(self, finding: Finding) -> None:
        assert same(Finding.from_json(through_a_file(finding.to_json())), finding)

    @given(strategies.action_records)
    def test_an_action_comes_back_from_a_file(self, action: ActionRecord) -> None:
        assert same(ActionRecord.from_json(through_a_file(action.to_json())), action)

    @given(strategies.run_infos)
    def test_the_facts_of_a_run_come_back_from_a_file(self, info: RunInfo) -> None:
        assert same(RunInfo.from_json(through_a_file(info.to_json())), info)

    def test_numpy_values_become_plain_ones(self) -> None:
        evidence = {"ratio": np.float32(2.5), "steps": np.arange(2), "count": np.int64(3), "worst": -np.inf}
        finding = Finding("f", "exploding", "warning", first_step=0, last_step=1, evidence=evidence)

        loaded = through_a_file(finding.to_json())

        assert loaded["evidence"] == {"ratio": 2.5, "steps": [0, 1], "count": 3, "worst": "-inf"}

    @pytest.mark.parametrize("cls", [Finding, ActionRecord])
    def test_keys_of_a_later_version_are_passed_over(self, cls: type[Finding | ActionRecord]) -> None:
        required: dict[str, Any] = {"id": "x", "rule": "spike", "severity": "info", "first_step": 1, "last_step": 2}
        required |= {"step": 3, "action": "Clip"}

        assert cls.from_json({**required, "of_a_later_version": 1}).id == "x"

    def test_a_finding_is_open_until_it_is_resolved(self) -> None:
        finding = Finding("f", "spike", "info", first_step=0, last_step=1)

        assert finding.is_open
        assert not dataclasses.replace(finding, resolved_step=2).is_open
