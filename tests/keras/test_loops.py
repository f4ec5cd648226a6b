"""Loops of the user's own, and `train_on_batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import gradwatch as gw
from gradwatch.errors import ModelError
from gradwatch.integrations.keras_loop import watch_keras
from gradwatch.reader import RunReader
from gradwatch.records import RENEWED
from tests.keras.training import (
    BACKEND,
    EXACT,
    batches,
    data,
    dense,
    difference,
    found_at,
    gradients,
    metrics,
    recorded,
    reference,
    relative_error,
)

SGD = keras.optimizers.SGD


def _loop(model: keras.Model, x: Any, y: Any, watcher: Any = None, *, compiled: bool = False) -> None:
    {"tensorflow": _tape, "torch": _plain, "jax": _stateless}[BACKEND](model, x, y, watcher, compiled=compiled)


def _tape(model: keras.Model, x: Any, y: Any, watcher: Any, *, compiled: bool) -> None:
    import tensorflow as tf

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.losses.mean_squared_error(y, model(x, training=True)))
        grads = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        return loss

    run = tf.function(step) if compiled else step
    for one in batches(x, y):
        loss = run(*map(tf.constant, one))
        if watcher is not None:
            watcher.log(loss=loss)


def _plain(model: keras.Model, x: Any, y: Any, watcher: Any, *, compiled: bool) -> None:
    for one in batches(x, y):
        grads = [keras.ops.convert_to_tensor(grad, "float32") for grad in gradients(model, *one)]
        model.optimizer.apply(grads, model.trainable_variables)
        if watcher is not None:
            watcher.log(loss=0.5)


def _stateless(model: keras.Model, x: Any, y: Any, watcher: Any, *, compiled: bool) -> None:
    import jax

    optimizer = model.optimizer

    def loss_of(trained: Any, x: Any, y: Any) -> Any:
        predicted, _ = model.stateless_call(trained, [], x)
        return keras.ops.mean(keras.losses.mean_squared_error(y, predicted))

    def step(trained: Any, held: Any, x: Any, y: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(trained, x, y)
        if watcher is None:
            return loss, *optimizer.stateless_apply(held, grads, trained), state
        return loss, *watcher.stateless_apply(optimizer, held, grads, trained, state=state)

    run = jax.jit(step) if compiled else step
    trained = [variable.value for variable in model.trainable_variables]
    held = [variable.value for variable in optimizer.variables]
    state = watcher.initial_state() if watcher is not None else {}
    for one in batches(x, y):
        loss, trained, held, state = run(trained, held, *one, state)
        if watcher is not None:
            state = watcher.took(state, loss=loss)
    for variable, value in zip(model.trainable_variables, trained, strict=True):
        variable.assign(value)


def _model(**kwargs: Any) -> keras.Model:
    model = dense(optimizer=SGD(0.05, momentum=0.9, **kwargs))
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_is_recorded_and_not_changed(tmp_path: Path, *, compiled: bool) -> None:
    x, y = data()
    plain, watched = _model(), _model()
    _loop(plain, x, y, compiled=compiled)
    with watch_keras(watched, watched.optimizer, run_dir=tmp_path / "run") as watcher:
        _loop(watched, x, y, watcher, compiled=compiled)
    assert difference(plain, watched) == 0.0
    assert relative_error(recorded(tmp_path / "run"), reference(_model(), batches(x, y))) < EXACT
    assert metrics(tmp_path / "run")["loss"].notna().all()
    assert not {"apply", "stateless_apply", "scale_loss"} & set(vars(watched.optimizer))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_is_clipped_and_bad_batches_skipped(tmp_path: Path, *, compiled: bool) -> None:
    x, y = data(24)
    y[8] = np.nan
    keep = np.r_[0:8, 12:24]
    plain, watched = _model(global_clipnorm=0.3), _model()
    _loop(plain, x[keep], y[keep], compiled=compiled)
    actions = [gw.SkipStep(), gw.Clip(max_norm=0.3)]
    with watch_keras(watched, watched.optimizer, run_dir=tmp_path / "run", actions=actions) as watcher:
        _loop(watched, x, y, watcher, compiled=compiled)
    assert difference(plain, watched) < EXACT
    assert metrics(tmp_path / "run")["skip_reason"].tolist() == ["", "", "nonfinite", "", "", ""]


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere every loop calls the optimizer like this")
def test_a_loop_that_jax_runs_op_by_op(tmp_path: Path) -> None:
    x, y = data(24)
    plain, watched, other = _model(), _model(), _model(global_clipnorm=0.3)
    _plain(plain, x, y, None, compiled=False)
    with watch_keras(watched, watched.optimizer, run_dir=tmp_path / "run") as watcher:
        _plain(watched, x, y, watcher, compiled=False)
    assert difference(plain, watched) == 0.0
    assert relative_error(recorded(tmp_path / "run"), reference(_model(), batches(x, y))) < EXACT
    y[8] = np.nan
    keep = np.r_[0:8, 12:24]
    _plain(other, x[keep], y[keep], None, compiled=False)
    watched = _model()
    actions = [gw.SkipStep(), gw.Clip(max_norm=0.3), gw.DecayLR(on="exploding")]
    with watch_keras(watched, watched.optimizer, run_dir=tmp_path / "clip", actions=actions, detectors=[]) as watcher:
        _plain(watched, x, y, watcher, compiled=False)
    assert difference(other, watched) < EXACT
    assert metrics(tmp_path / "clip")["skip_reason"].tolist() == ["", "", "nonfinite", "", "", ""]


def test_stop_leaves_a_loop(tmp_path: Path) -> None:
    model, found = _model(), [found_at(5, "dead")]
    with (
        watch_keras(
            model, model.optimizer, run_dir=tmp_path / "run", actions=[gw.Stop(on="dead")], detectors=found
        ) as watcher,
        pytest.raises(gw.StopTraining, match="training stopped"),
    ):
        _loop(model, *data(40), watcher)
    assert len(recorded(tmp_path / "run")) == (7 if BACKEND == "jax" else 6)


def test_new_weights_in_a_loop(tmp_path: Path) -> None:
    model, actions = _model(), [gw.Reinitialize(on="exploding", confirm=0)]
    with watch_keras(
        model, model.optimizer, run_dir=tmp_path / "run", actions=actions, detectors=[found_at(1)]
    ) as watcher:
        _loop(model, *data(16), watcher)
    (action, *_) = RunReader(tmp_path / "run").action_list()
    if BACKEND == "jax":
        assert action.outcome == "failed: the weights and the optimizer's state are in variables of the loop"
    else:
        table = metrics(tmp_path / "run")
        assert table.index[table[RENEWED] == 1.0].tolist() == [action.step] == [2]


def test_train_on_batch_is_watched_until_close(tmp_path: Path) -> None:
    x, y = data()
    plain, watched = dense(), dense()
    for one in batches(x, y):
        plain.train_on_batch(*one)
    with watch_keras(watched, run_dir=tmp_path / "run"):
        for one in batches(x, y):
            watched.train_on_batch(*one)
    assert difference(plain, watched) == 0.0
    assert type(watched.train_function) is type(plain.train_function)
    assert relative_error(recorded(tmp_path / "run"), reference(dense(), batches(x, y))) < EXACT


def test_a_model_that_is_not_compiled_needs_an_optimizer(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ModelError, match="is not compiled: name the optimizer"):
        watch_keras(model, run_dir=tmp_path / "run")
