"""One batch before the training."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from gradwatch.backends.keras_probe import probe
from gradwatch.preflight import judge
from tests.keras.training import data, dense, gradients, norms

layers = keras.layers


def _mse(outputs: object, targets: object) -> object:
    return keras.ops.mean(keras.ops.square(outputs - targets))  # type: ignore[operator]


def test_a_probe_measures_the_gradients_and_leaves_the_model_alone() -> None:
    x, y = data(12)
    model = dense()
    before = model.get_weights()
    loss, probed, found, names = probe(model, x, y, _mse)
    assert loss == pytest.approx(float(model.evaluate(x, y, verbose=0)), rel=1e-5)
    assert [found[name] for name in names] == pytest.approx(norms(gradients(model, x, y)), rel=1e-5)
    assert [layer.layer for layer in probed] == ["hidden", "out"]
    assert probed[1].output_grad_rms == pytest.approx(
        np.sqrt(np.mean(np.square(2 / 24 * (model.predict(x, verbose=0) - y)))), rel=1e-4
    )
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_a_loss_of_keras_gets_the_targets_first() -> None:
    x, _ = data(12)
    labels = np.arange(12) % 2
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2, "softmax")])
    model.compile(loss="sparse_categorical_crossentropy")

    loss, *_ = probe(model, x, labels, keras.losses.SparseCategoricalCrossentropy())

    assert loss == pytest.approx(float(model.evaluate(x, labels, verbose=0)), rel=1e-5)


def test_a_deep_sigmoid_network_is_found_to_vanish() -> None:
    x, y = data(32)
    parts = [keras.Input((6,)), *(layers.Dense(8, "sigmoid") for _ in range(10)), layers.Dense(2)]
    loss, probed, found, names = probe(keras.Sequential(parts), x, y, _mse)
    check = judge(loss, probed, unused=[name for name in names if name not in found])
    assert check.verdict == "vanishing"
    assert check.where == probed[0].layer
