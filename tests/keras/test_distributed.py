"""Several devices, one gradient: two logical CPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
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


def _free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_two_workers_record_once_and_act_alike(tmp_path: Path) -> None:
    ports, results = ",".join(_free_ports(2)), [tmp_path / f"{index}.json" for index in range(2)]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.keras.worker", str(index), ports, str(tmp_path / "run"), str(result)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, result in enumerate(results)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    one, other = (json.loads(result.read_text()) for result in results)
    assert one == other
    assert one["errors"] == {}
    assert one["findings"] == [["nonfinite", 3]]

    x, y = data(24)
    single = dense(optimizer=SGD(0.05, global_clipnorm=0.5))
    keep = np.r_[0:12, 16:24]
    expected = reference(single, batches(x[keep], y[keep]))
    found = recorded(tmp_path / "run")
    assert relative_error(found[[0, 1, 2, 4, 5]], expected) < EXACT
    assert np.isnan(found[3]).all()
    assert metrics(tmp_path / "run")["skip_reason"].tolist() == ["", "", "", "nonfinite", "", ""]
    assert (
        max(float(np.abs(np.array(a) - b).max()) for a, b in zip(one["weights"], single.get_weights(), strict=True))
        < EXACT
    )
