"""The names that users call."""

from __future__ import annotations

from pathlib import Path

import keras

import gradwatch as gw
from tests.keras.training import data, dense, fit


def test_the_callback_is_in_the_public_namespace(tmp_path: Path) -> None:
    callback = gw.keras.GradWatch(run_dir=tmp_path / "run")
    fit(dense(), *data(8), callback, epochs=1)
    assert len(gw.load(tmp_path / "run").grad_norms()) == 2


def test_watch_and_preflight_take_keras_models(tmp_path: Path) -> None:
    model, (x, y) = dense(), data(8)
    with gw.watch(model, run_dir=tmp_path / "run"):
        model.train_on_batch(x, y)
    assert len(gw.load(tmp_path / "run").grad_norms()) == 1
    assert gw.preflight(model, x, y, keras.losses.MeanSquaredError()).is_healthy
