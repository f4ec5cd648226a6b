"""What the record of a `fit` says, against automatic differentiation."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from gradwatch.backends.keras_model import Columns
from gradwatch.backends.keras_tap import Tap
from gradwatch.keras import GradWatch
from gradwatch.reader import RunReader
from tests.keras.training import (
    BACKEND,
    EXACT,
    batches,
    data,
    dense,
    difference,
    fit,
    metrics,
    recorded,
    reference,
    relative_error,
)


@pytest.mark.parametrize("jit", [False, True])
def test_norms_are_exact_and_weights_bit_identical(tmp_path: Path, *, jit: bool) -> None:
    x, y = data()
    watched = fit(dense(jit_compile=jit), x, y, GradWatch(run_dir=tmp_path / "run"))
    assert relative_error(recorded(tmp_path / "run"), reference(dense(), batches(x, y, epochs=2))) < EXACT
    assert difference(fit(dense(jit_compile=jit), x, y), watched) == 0.0


def test_norms_of_an_eager_training(tmp_path: Path) -> None:
    x, y = data()
    watched = fit(dense(run_eagerly=True), x, y, GradWatch(run_dir=tmp_path / "run"))
    assert difference(fit(dense(run_eagerly=True), x, y), watched) == 0.0
    assert relative_error(recorded(tmp_path / "run"), reference(dense(), batches(x, y, epochs=2))) < EXACT


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on PyTorch")
def test_every_step_of_an_execution_of_three_is_recorded(tmp_path: Path) -> None:
    x, y = data(46)
    fit(dense(steps_per_execution=3), x, y, GradWatch(run_dir=tmp_path / "run"))
    assert relative_error(recorded(tmp_path / "run"), reference(dense(), batches(x, y, epochs=2))) < EXACT
    table = metrics(tmp_path / "run")
    assert table["batch"].tolist() == [*range(12)] * 2


def _sgd(**kwargs: object) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.05, momentum=0.9, **kwargs)


OPTIMIZERS = {
    "clipnorm": lambda: _sgd(clipnorm=0.1),
    "global_clipnorm": lambda: _sgd(global_clipnorm=0.1),
    "clipvalue": lambda: _sgd(clipvalue=0.01),
    "ema": lambda: _sgd(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2),
    "loss_scale_factor": lambda: _sgd(loss_scale_factor=128.0),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_are_those_before_what_the_optimizer_does(tmp_path: Path, name: str) -> None:
    x, y = data()
    plain = dense(optimizer=OPTIMIZERS[name]())
    watched = fit(dense(optimizer=OPTIMIZERS[name]()), x, y, GradWatch(run_dir=tmp_path / "run"))
    expected = reference(dense(optimizer=OPTIMIZERS[name]()), batches(x, y, epochs=2))
    assert relative_error(recorded(tmp_path / "run"), expected) < EXACT
    assert difference(fit(plain, x, y), watched) == 0.0


def test_loss_rate_epoch_and_metrics_are_in_the_record(tmp_path: Path) -> None:
    x, y = data(8)
    model = dense(optimizer=OPTIMIZERS["schedule"](), metrics=["mae"])
    history = model.fit(
        x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, validation_data=(x, y),
        callbacks=[GradWatch(run_dir=tmp_path / "run")],
    )  # fmt: skip
    table = metrics(tmp_path / "run")
    assert table["epoch"].tolist() == [0, 0, 1, 1]
    assert table["batch"].tolist() == [0, 1, 0, 1]
    assert table["lr"].to_numpy() == pytest.approx(0.1 * 0.5 ** (np.arange(4) / 2), rel=1e-6)
    assert table["loss"].groupby(table["epoch"]).mean().to_numpy() == pytest.approx(history.history["loss"], rel=1e-5)
    assert table["mae"].iloc[[1, 3]].to_numpy() == pytest.approx(history.history["mae"], rel=1e-6)
    assert table["val_loss"].iloc[[1, 3]].to_numpy() == pytest.approx(history.history["val_loss"], rel=1e-6)


def test_the_record_names_the_backend(tmp_path: Path) -> None:
    fit(dense(), *data(4), GradWatch(run_dir=tmp_path / "run"))
    info = RunReader(tmp_path / "run").info
    assert (info.framework, info.config["backend"], info.status) == ("keras", BACKEND, "finished")
    assert {"keras", BACKEND} <= set(info.versions)


def test_layers_stand_as_in_the_graph_with_the_activation_that_follows() -> None:
    layers = keras.layers
    last, first, inputs = layers.Dense(2, name="last"), layers.Dense(4, name="first"), keras.Input((6,))
    hidden = layers.Activation("relu")(layers.BatchNormalization(name="norm")(first(inputs)))
    parameters = Columns(keras.Model(inputs, last(layers.Dropout(0.5)(hidden)))).parameters
    assert {p.layer: (p.depth, p.activation) for p in parameters} == {
        "first": (0, "ReLU"), "norm": (1, "ReLU"), "last": (2, ""),
    }  # fmt: skip


def test_weights_and_their_updates_are_sampled(tmp_path: Path) -> None:
    x, y = data(16)
    model = dense()
    weights = [model.get_weights()]
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: weights.append(model.get_weights()))
    if BACKEND == "jax":  # outside of this property, the weights are not in the model while it trains
        keep = keras.callbacks.LambdaCallback()
        keep.on_train_batch_end = lambda batch, logs=None: weights.append(keep.model.get_weights())
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", stats_every=2), keep, epochs=1)
    ratio = RunReader(tmp_path / "run").statistic("update_ratio").dropna()
    assert ratio.index.tolist() == [0, 2]
    for step, (_, row) in zip((0, 2), ratio.iterrows(), strict=True):
        changes = [np.linalg.norm(b - a) / np.linalg.norm(b) for a, b in zip(*weights[step : step + 2], strict=True)]
        assert row.to_numpy() == pytest.approx(changes, rel=1e-4)


def test_a_training_goes_on_where_we_cannot_sit_on_its_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = data()
    plain = fit(dense(), x, y)
    monkeypatch.setattr(Tap, "attached", None)
    callback = GradWatch(run_dir=tmp_path / "run")

    assert difference(plain, fit(dense(), x, y, callback)) == 0.0
    assert callback.watcher is not None
    assert callback.watcher.overhead()["failures"] == {"keras tap": 1}
