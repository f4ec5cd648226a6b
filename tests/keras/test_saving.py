"""Nothing of ours gets into what is saved, cloned or pickled, during the training and after it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import gradwatch as gw
from gradwatch.keras import GradWatch
from gradwatch.reader import RunReader
from tests.keras.training import BACKEND, data, dense, difference, fit, metrics, recorded


class Saves(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Saves, pickles and clones in mid-fit."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.pickled = b""
        self.weights: list[np.ndarray] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 2:
            model = self.model
            model.save(self.folder / "model.keras")
            model.save_weights(self.folder / "model.weights.h5")
            self.pickled = pickle.dumps(model)
            self.cloned = keras.models.clone_model(model)
            self.weights = model.get_weights()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saving_in_mid_fit_is_as_without_the_callback(tmp_path: Path) -> None:
    x, y = data()
    actions = [gw.Clip(max_norm=10.0), gw.SkipStep(), gw.DecayLR()]
    model, saves = dense(), Saves(tmp_path)
    variables = [variable.path for variable in (*model.variables, *model.optimizer.variables)]
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=2)
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "checkpoint.keras", save_freq=3)
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", actions=actions), saves, backup, checkpoint, epochs=1)
    saved = [keras.models.load_model(tmp_path / "model.keras"), pickle.loads(saves.pickled)]  # noqa: S301 -- our own bytes
    saved.append(keras.models.load_model(tmp_path / "checkpoint.keras"))
    for each in saved:
        assert int(each.optimizer.iterations) == (6 if each is saved[2] else 3)
        assert len(each.optimizer.variables) == len(model.optimizer.variables)
    assert all(np.array_equal(a, b) for a, b in zip(saved[0].get_weights(), saves.weights, strict=True))
    fresh = dense()
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert difference(fresh, saved[0]) == 0.0
    names = [variable.path for variable in (*model.variables, *model.optimizer.variables)]
    assert len(names) - len(variables) in (0, 8)  # the moments, where Keras makes them in the first step


class Dies(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == (1, 3):
            raise InterruptedError


@pytest.mark.parametrize("is_new_process", [False, True])
def test_a_fit_that_is_restored_after_an_interruption_is_as_without_the_callback(
    tmp_path: Path, *, is_new_process: bool
) -> None:
    x, y = data(24)

    def restored(folder: Path, *watch: Any) -> keras.Model:
        def train(model: keras.Model, *callbacks: Any) -> None:
            fit(model, x, y, *callbacks, keras.callbacks.BackupAndRestore(folder), epochs=3)

        model = dense()
        with pytest.raises(InterruptedError):
            train(model, *watch[:1], Dies())
        model = dense() if is_new_process else model
        train(model, *watch[1:])
        return model

    first = GradWatch(run_dir=tmp_path / "run")
    second = GradWatch(run_dir=tmp_path / "run", resume=True) if is_new_process else first
    watched = restored(tmp_path / "watched", first, second)
    assert difference(restored(tmp_path / "plain"), watched) == 0.0
    assert metrics(tmp_path / "run")["epoch"].tolist() == [0] * 6 + [1] * 10 + [2] * 6
    norms = recorded(tmp_path / "run")
    assert np.array_equal(norms[6:10], norms[10:14])
    assert RunReader(tmp_path / "run").info.status == "finished"


def test_after_the_fit_the_model_is_as_it_was(tmp_path: Path) -> None:
    x, y = data(8)
    model = dense()
    fit(model, x, y, epochs=1)
    before = {name: id(value) for name, value in vars(model).items()}, set(vars(model.optimizer))
    function = model.train_function
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", actions=[gw.Clip(max_norm=1.0), gw.DecayLR()]), epochs=1)
    assert model.train_function is function
    assert set(vars(model)) == set(before[0])
    assert set(vars(model.optimizer)) == before[1]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.train.Checkpoint and tf.distribute are TensorFlow's")
def test_a_tensorflow_checkpoint_has_the_same_keys(tmp_path: Path) -> None:
    import tensorflow as tf

    def keys(model: keras.Model) -> int:
        path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
        return len(tf.train.load_checkpoint(path).get_variable_to_shape_map())

    x, y = data(8)
    watched = fit(dense(), x, y, GradWatch(run_dir=tmp_path / "run", actions=[gw.SkipStep(), gw.DecayLR()]), epochs=1)
    assert keys(watched) == keys(fit(dense(), x, y, epochs=1))
