"""Several devices, one gradient: two logical CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import gradwatch as gw
from gradwatch.keras import GradWatch
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

SGD = keras.optimizers.SGD


@pytest.fixture(scope="module")
def mirrored() -> Any:
    if BACKEND != "tensorflow":
        pytest.skip("tf.distribute is TensorFlow's")
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def test_a_mirrored_gradient_is_recorded_once_and_whole(tmp_path: Path, mirrored: Any) -> None:
    x, y = data(24)
    expected = reference(dense(optimizer=SGD(0.05)), batches(x, y))
    with mirrored.scope():
        plain, watched = dense(optimizer=SGD(0.05)), dense(optimizer=SGD(0.05))
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert relative_error(recorded(tmp_path / "run"), expected) < EXACT
    assert difference(fit(plain, x, y, epochs=1), watched) == 0.0


def test_a_mirrored_training_is_clipped_and_skipped_as_a_single_one(tmp_path: Path, mirrored: Any) -> None:
    x, y = data(24)
    y[8] = np.nan
    keep = np.r_[0:8, 12:24]
    single = fit(dense(optimizer=SGD(0.05, global_clipnorm=0.3)), x[keep], y[keep], epochs=1)
    with mirrored.scope():
        watched = dense(optimizer=SGD(0.05))
    actions = [gw.SkipStep(), gw.Clip(max_norm=0.3), gw.DecayLR()]
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions, detectors=[]), epochs=1)
    assert difference(single, watched) < EXACT
    assert metrics(tmp_path / "run")["skip_reason"].tolist() == ["", "", "nonfinite", "", "", ""]


def test_an_optimizer_that_clips_by_itself_is_not_disturbed(tmp_path: Path, mirrored: Any) -> None:
    x, y = data(24)
    with mirrored.scope():
        plain, watched = dense(optimizer=SGD(0.05, clipvalue=0.1)), dense(optimizer=SGD(0.05, clipvalue=0.1))
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert difference(fit(plain, x, y, epochs=1), watched) == 0.0


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's")
def test_a_data_parallel_gradient_on_jax(tmp_path: Path) -> None:
    x, y = data(24)
    expected = reference(dense(optimizer=SGD(0.05)), batches(x, y))
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        model = dense(optimizer=SGD(0.05), jit_compile=True)
        actions = [gw.SkipStep(), gw.Clip(max_norm=1e6), gw.DecayLR()]
        fit(model, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions), epochs=1)
    finally:
        keras.distribution.set_distribution(None)
    assert relative_error(recorded(tmp_path / "run"), expected) < EXACT
