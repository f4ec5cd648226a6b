"""The hard cases: what users do with Keras models, each against automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import gradwatch as gw
from gradwatch.errors import ModelError
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
    gradients,
    metrics,
    norms,
    recorded,
    reference,
    relative_error,
)

layers = keras.layers
SGD = keras.optimizers.SGD


def _compiled(model: keras.Model, **kwargs: Any) -> keras.Model:
    model.compile(**{"optimizer": SGD(0.05, momentum=0.9), "loss": "mse", "jit_compile": False, **kwargs})
    return model


def _nested() -> keras.Model:
    block = keras.Sequential([keras.Input((6,)), layers.Dense(5, "relu"), layers.Dense(6)], name="block")
    inputs = keras.Input((6,))
    return _compiled(keras.Model(inputs, layers.Dense(2)(block(inputs))))


def _shared() -> keras.Model:
    inputs, shared = keras.Input((6,)), layers.Dense(6, "tanh")
    return _compiled(keras.Model(inputs, layers.Dense(2)(shared(shared(inputs)))))


class Subclassed(keras.Model):  # type: ignore[misc]  # Keras has no types
    """Not built before its first batch; one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = layers.Dense(5, activation="relu")
        self.last = layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.last(self.first(x))


def _normalized() -> keras.Model:
    inputs = keras.Input((6,))
    hidden = layers.Activation("relu")(layers.BatchNormalization()(layers.Dense(6)(inputs)))
    # The reference on JAX is compiled: XLA's fusion alone changes gradients behind a batch of four by 1e-6.
    return _compiled(keras.Model(inputs, layers.Dense(2)(hidden)), jit_compile=BACKEND == "jax")


def _convolutional() -> keras.Model:
    parts = [keras.Input((6,)), layers.Reshape((6, 1)), layers.Conv1D(3, 3), layers.Flatten(), layers.Dense(2)]
    return _compiled(keras.Sequential(parts))


def _recurrent() -> keras.Model:
    return _compiled(keras.Sequential([keras.Input((6,)), layers.Reshape((6, 1)), layers.LSTM(3), layers.Dense(2)]))


MODELS = {
    "nested": _nested,
    "shared": _shared,
    "subclassed": lambda: _compiled(Subclassed()),
    "unbuilt": lambda: _compiled(keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(2)])),
    "normalized": _normalized,
    "convolutional": _convolutional,
    "recurrent": _recurrent,
}


@pytest.mark.parametrize("name", MODELS)
def test_norms_of_models_of_every_kind(tmp_path: Path, name: str) -> None:
    x, y = data(12)
    watched = fit(_seeded(name), x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert difference(fit(_seeded(name), x, y, epochs=1), watched) == 0.0
    other = _seeded(name)
    if not other.built:
        other(x[:4])
    assert relative_error(recorded(tmp_path / "run"), reference(other, batches(x, y))) < EXACT


def _seeded(name: str) -> keras.Model:
    keras.utils.set_random_seed(3)
    return MODELS[name]()


def test_a_frozen_layer_has_a_column_without_numbers(tmp_path: Path) -> None:
    x, y = data(12)

    def frozen() -> keras.Model:
        model = dense()
        model.get_layer("hidden").trainable = False
        return _compiled(model)

    fit(frozen(), x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    found = recorded(tmp_path / "run")
    assert np.isnan(found[:, :2]).all()
    assert relative_error(found[:, 2:], reference(frozen(), batches(x, y))) < EXACT
    assert RunReader(tmp_path / "run").parameters()["trainable"].tolist() == [False, False, True, True]


@pytest.mark.filterwarnings("ignore:.*[Gg]radients:UserWarning")
def test_an_unused_layer_is_not_measured_where_the_backend_tells(tmp_path: Path) -> None:
    class Unused(Subclassed):
        def __init__(self) -> None:
            super().__init__()
            self.spare = layers.Dense(3)
            self.spare.build((None, 6))

    x, y = data(8)
    model = _compiled(Unused())
    model(x[:4])
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    table = RunReader(tmp_path / "run").grad_norms()
    spare = table[[name for name in table.columns if "dense_2" in name or name.count("/") == 1][-2:]].to_numpy()
    assert (spare == 0.0).all() if BACKEND == "jax" else np.isnan(spare).all()


def test_sparse_gradients_sum_their_duplicates(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, size=(12, 7)), rng.normal(size=(12, 2)).astype("float32")

    def embedded(**kwargs: Any) -> keras.Model:
        keras.utils.set_random_seed(3)
        parts = [keras.Input((7,), dtype="int32"), layers.Embedding(9, 4), layers.Flatten(), layers.Dense(2)]
        return _compiled(keras.Sequential(parts), **kwargs)

    fit(embedded(), x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert relative_error(recorded(tmp_path / "run"), reference(embedded(), batches(x, y))) < EXACT
    clipped = fit(embedded(), x, y, GradWatch(run_dir=tmp_path / "clip", actions=[gw.Clip(max_norm=0.1)]), epochs=1)
    plain = embedded(optimizer=SGD(0.05, momentum=0.9))
    for one in batches(x, y):
        grads = gradients(plain, *one)
        size = np.sqrt(sum(np.sum(g**2) for g in grads if g is not None))
        assert size > 0.1
        values = [keras.ops.convert_to_tensor((g * 0.1 / size).astype("float32")) for g in grads if g is not None]
        plain.optimizer.apply(values, plain.trainable_variables)
    assert difference(plain, clipped) < EXACT


class Custom(keras.Model):  # type: ignore[misc]  # Keras has no types
    """A train step of the user's own, on each backend."""

    def train_step(self, *args: Any) -> Any:
        return super().train_step(*args)


def test_a_custom_train_step(tmp_path: Path) -> None:
    x, y = data(12)

    def custom() -> keras.Model:
        inner = dense()
        return _compiled(Custom(inner.input, inner.output))

    fit(custom(), x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert relative_error(recorded(tmp_path / "run"), reference(custom(), batches(x, y))) < EXACT


def test_accumulation_records_and_clips_the_mean_gradient_of_an_update(tmp_path: Path) -> None:
    x, y = data(32)

    def accumulating(**kwargs: Any) -> keras.Model:
        return dense(optimizer=SGD(0.05, momentum=0.9, gradient_accumulation_steps=4, **kwargs))

    watched = fit(accumulating(), x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert difference(fit(accumulating(), x, y, epochs=1), watched) == 0.0
    whole = reference(dense(optimizer=SGD(0.05, momentum=0.9)), batches(x, y, 16))
    assert relative_error(recorded(tmp_path / "run"), whole) < EXACT
    assert metrics(tmp_path / "run")["batch"].tolist() == [3, 7]
    clip = GradWatch(run_dir=tmp_path / "clip", actions=[gw.Clip(max_norm=0.1)])
    clipped = fit(accumulating(), x, y, clip, epochs=1)
    assert difference(fit(accumulating(global_clipnorm=0.1), x, y, epochs=1), clipped) < EXACT


def test_skipping_an_accumulated_update_skips_its_batches(tmp_path: Path) -> None:
    x, y = data(48)
    y[20] = np.nan

    def accumulating() -> keras.Model:
        return dense(optimizer=keras.optimizers.Adam(0.01, gradient_accumulation_steps=4))

    watched = fit(accumulating(), x, y, GradWatch(run_dir=tmp_path / "run", actions=[gw.SkipStep()]), epochs=1)
    keep = np.r_[0:16, 32:48]
    assert difference(fit(accumulating(), x[keep], y[keep], epochs=1), watched) < EXACT
    assert metrics(tmp_path / "run")["skip_reason"].tolist() == ["", "nonfinite", ""]


def _scaled(scale: float = 1024.0, **kwargs: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(SGD(0.05, momentum=0.9, **kwargs), initial_scale=scale)


@pytest.mark.parametrize("actions", [(), (gw.SkipStep(),)])
def test_loss_scaling_is_taken_out_and_its_skips_are_marked(tmp_path: Path, actions: tuple[Any, ...]) -> None:
    x, y = data(24)
    watched = dense(optimizer=_scaled())
    y[8] = np.nan
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions), epochs=1)
    assert difference(fit(dense(optimizer=_scaled()), x, y, epochs=1), watched) == 0.0
    assert metrics(tmp_path / "run")["skip_reason"].tolist() == ["", "", "grad_scaler", "", "", ""]
    assert float(watched.optimizer.dynamic_scale.numpy()) == 512.0
    assert metrics(tmp_path / "run")["grad_scale"].tolist() == [1024.0] * 3 + [512.0] * 3
    expected = reference(dense(optimizer=_scaled()), batches(x, y))
    finite = [0, 1, 3, 4, 5]
    assert relative_error(recorded(tmp_path / "run")[finite], expected[finite]) < EXACT


def test_clipping_and_the_rate_under_loss_scaling(tmp_path: Path) -> None:
    x, y = data(24)
    watched = dense(optimizer=_scaled())
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run", actions=[gw.Clip(max_norm=0.3), gw.DecayLR()], detectors=[]))
    assert difference(fit(dense(optimizer=_scaled(global_clipnorm=0.3)), x, y), watched) < EXACT
    watched = dense(optimizer=_scaled())
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "value", actions=[gw.Clip(value=0.05)]))
    assert difference(fit(dense(optimizer=_scaled(clipvalue=0.05)), x, y), watched) < EXACT


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(tmp_path: Path, policy: str) -> None:
    x, y = data(12)
    # As the reference is run: a compiler that fuses layers rounds to bfloat16 at other places.
    how = {"jit_compile": BACKEND == "jax", "run_eagerly": BACKEND == "tensorflow" and policy == "mixed_bfloat16"}

    def mixed() -> keras.Model:
        keras.config.set_dtype_policy(policy)
        try:
            return dense(optimizer=SGD(0.05), auto_scale_loss=True, **how)
        finally:
            keras.config.set_dtype_policy("float32")

    watched = fit(mixed(), x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert difference(fit(mixed(), x, y, epochs=1), watched) == 0.0
    assert relative_error(recorded(tmp_path / "run"), reference(mixed(), batches(x, y))) < EXACT


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_generators_and_early_stop(tmp_path: Path) -> None:
    x, y = data(16)

    def endless() -> Iterator[Any]:
        while True:
            yield from batches(x, y)

    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=100.0)
    model = dense()
    model.fit(
        endless(),
        shuffle=False,
        steps_per_epoch=3,
        epochs=5,
        verbose=0,
        callbacks=[GradWatch(run_dir=tmp_path / "run"), stop],
    )
    assert len(recorded(tmp_path / "run")) == 6

    model.fit(
        (batch for batch in batches(x, y)), shuffle=False, verbose=0, callbacks=[GradWatch(run_dir=tmp_path / "short")]
    )
    assert len(recorded(tmp_path / "short")) == 4


def test_a_second_fit_goes_on_with_the_run(tmp_path: Path) -> None:
    x, y = data(12)
    callback, model = GradWatch(run_dir=tmp_path / "run"), dense()
    fit(model, x, y, callback, epochs=1)
    plain = model.train_function
    fit(model, x, y, callback, epochs=1)
    assert model.train_function is plain
    assert relative_error(recorded(tmp_path / "run"), reference(dense(), batches(x, y, epochs=2))) < EXACT
    assert metrics(tmp_path / "run").index.tolist() == [*range(6)]


def test_train_on_batch_after_a_fit_is_plain_again(tmp_path: Path) -> None:
    x, y = data(8)
    model = dense()
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    model.train_on_batch(x, y)
    assert len(recorded(tmp_path / "run")) == 2


class Failing(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 1:
            raise self.error("on purpose")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_that_dies_leaves_nothing_in_the_next(tmp_path: Path, error: type[BaseException]) -> None:
    x, y = data(16)
    model, callback = dense(), GradWatch(run_dir=tmp_path / "run")
    with pytest.raises(error):
        fit(model, x, y, callback, Failing(error))
    fit(model, x, y, epochs=1)
    assert type(model.train_function).__name__ == "function"
    assert RunReader(tmp_path / "run").info.status == "crashed"
    assert len(recorded(tmp_path / "run")) == 2


def test_an_error_in_the_step_restores_the_model_at_once(tmp_path: Path) -> None:
    x, y = data(16)

    def broken() -> Iterator[Any]:
        yield from batches(x[:8], y[:8])
        raise ValueError("no more data")

    model = dense()
    with pytest.raises(Exception, match="no more data"):
        model.fit(
            broken(), shuffle=False, steps_per_epoch=4, verbose=0, callbacks=[GradWatch(run_dir=tmp_path / "run")]
        )
    assert "apply" not in vars(model.optimizer)
    fit(model, x, y, epochs=1)
    assert type(model.train_function).__name__ == "function"
    assert len(recorded(tmp_path / "run")) == 2


@pytest.mark.skipif(BACKEND != "jax", reason="NNX is JAX's")
def test_nnx_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "is_nnx_enabled", lambda: True)
    with pytest.raises(ModelError, match="KERAS_NNX_ENABLED"):
        fit(dense(), *data(4), GradWatch(run_dir=tmp_path / "run"))


@pytest.mark.skipif(BACKEND == "jax", reason="Keras gives a JAX train step one optimizer only")
def test_two_optimizers_share_a_row(tmp_path: Path) -> None:
    class Two(keras.Model):  # type: ignore[misc]  # Keras has no types
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = layers.Dense(2), layers.Dense(2)
            self.one.build((None, 6))
            self.two.build((None, 6))
            self.other = SGD(0.02)
            self.built = True

        def call(self, x: Any) -> Any:
            return self.one(x) + self.two(x)

        def train_step(self, batch: Any) -> Any:
            x, _ = batch
            grads = [keras.ops.convert_to_tensor(np.full(v.shape, 2.0, "float32")) for v in self.trainable_variables]
            self.optimizer.apply(grads[:2], self.one.trainable_variables)
            self.other.apply(grads[2:], self.two.trainable_variables)
            return {"loss": keras.ops.mean(x) * 0.0}

    model = _compiled(Two(), optimizer=SGD(0.01))
    fit(model, *data(12), GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert recorded(tmp_path / "run") == pytest.approx(2.0 * np.sqrt([[12.0, 2.0, 12.0, 2.0]] * 3))
    table = metrics(tmp_path / "run")
    assert table["lr"].tolist() == pytest.approx([0.01] * 3)
    assert table["lr.1"].tolist() == pytest.approx([0.02] * 3)


def test_norms_of_every_optimizer_of_keras_stay_those_of_the_gradient(tmp_path: Path) -> None:
    x, y = data(8)
    for kind in ("Adafactor", "Lamb", "Nadam", "Muon"):
        make: Callable[[], Any] = getattr(keras.optimizers, kind)
        watched = fit(dense(optimizer=make()), x, y, GradWatch(run_dir=tmp_path / kind), epochs=1)
        assert difference(fit(dense(optimizer=make()), x, y, epochs=1), watched) == 0.0, kind
        assert recorded(tmp_path / kind)[0] == pytest.approx(norms(gradients(dense(), x[:4], y[:4])), rel=EXACT), kind
