"""What is sampled inside the step: extremes of gradients and outputs of activations, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from gradwatch.errors import ConfigurationError
from gradwatch.keras import GradWatch
from gradwatch.reader import RunReader
from tests.keras.training import BACKEND, batches, data, dense, difference, fit, gradients

layers = keras.layers
EXTREMES: dict[str, Callable[[Any], Any]] = {
    "grad_max": lambda grad: np.max(np.abs(grad)),
    "zero_fraction": lambda grad: np.mean(grad == 0),
    "nonfinite_count": lambda grad: np.sum(~np.isfinite(grad)),
}


def sampled(run_dir: Path, name: str) -> Any:
    return RunReader(run_dir).statistic(name).dropna(how="all")


def _mixed(*, built: bool = True, **kwargs: Any) -> keras.Model:
    """A tanh, a rectifier half of whose units are dead, and one that stands alone."""
    keras.utils.set_random_seed(5)
    start = [keras.Input((6,))] if built else []
    dying = keras.initializers.Constant([-100.0] * 3 + [1.0] * 3)
    parts = [layers.Dense(8, "tanh", kernel_initializer="he_normal"), layers.Dense(6, "relu", bias_initializer=dying)]
    model = keras.Sequential([*start, *parts, layers.Dense(4), layers.LeakyReLU(), layers.Dense(2)])
    model.compile(**{"optimizer": keras.optimizers.SGD(0.05), "loss": "mse", "jit_compile": False, **kwargs})
    return model


@pytest.mark.parametrize("jit", [False] if BACKEND == "torch" else [False, True])
def test_extremes_of_gradients_are_sampled(tmp_path: Path, *, jit: bool) -> None:
    x, y = data(16)
    y[12:] = np.nan
    model = _mixed()
    references = []
    for one in batches(x, y):
        references.append(gradients(model, *one))
        model.train_on_batch(*one)
    fit(_mixed(jit_compile=jit), x, y, GradWatch(run_dir=tmp_path / "run", stats_every=2), epochs=1)
    assert sampled(tmp_path / "run", "grad_max").index.tolist() == [0, 2]
    for name, of in EXTREMES.items():
        found = sampled(tmp_path / "run", name).to_numpy()
        expected = [[of(grad) for grad in references[step]] for step in (0, 2)]
        assert found == pytest.approx(np.array(expected), rel=1e-5), name


def test_elements_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    x, y = data(4)
    y[:, 0] = np.nan
    fit(dense(), x, y, GradWatch(run_dir=tmp_path / "run"), epochs=1)
    assert sampled(tmp_path / "run", "nonfinite_count").to_numpy()[0].tolist() == [48, 8, 8, 1]
    assert np.isfinite(sampled(tmp_path / "run", "grad_max").to_numpy()).all()


def test_outputs_of_activations_are_sampled_when_asked_for(tmp_path: Path) -> None:
    x, y = data(12)
    model = _mixed(optimizer=keras.optimizers.SGD(0.0))
    first, third = ([keras.ops.convert_to_numpy(o) for o in _outputs(model, x[k : k + 4])] for k in (0, 8))
    fit(model, x, y, GradWatch(run_dir=tmp_path / "run", activations=True, stats_every=2), epochs=1)
    mean, deviation = (sampled(tmp_path / "run", f"activation_{name}").iloc[0] for name in ("mean", "std"))
    later = sampled(tmp_path / "run", "activation_mean").loc[2]
    assert later.to_numpy() == pytest.approx([output.mean() for output in third], rel=1e-5)
    assert mean.to_numpy() == pytest.approx([output.mean() for output in first], rel=1e-5)
    assert deviation.to_numpy() == pytest.approx([output.std() for output in first], rel=1e-5)
    saturated, dead = (sampled(tmp_path / "run", f"{name}_fraction").iloc[0] for name in ("saturated", "dead"))
    assert saturated.iloc[0] == pytest.approx(np.mean(np.abs(first[0]) >= 0.995))
    assert dead.iloc[1] == np.mean(first[1].max(0) <= 0) >= 0.5
    assert len(set(mean.index)) == 3


def _outputs(model: keras.Model, x: Any) -> list[Any]:
    wanted = [layer.output for layer in model.layers if layer.name.startswith(("dense", "leaky"))]
    found = keras.Model(model.inputs, wanted)([x])
    return [found[0], found[1], found[3]]


@pytest.mark.skipif(BACKEND == "torch", reason="refused there")
def test_sampling_outputs_leaves_a_compiled_training_bit_identical(tmp_path: Path) -> None:
    x, y = data(16)
    watched = _mixed(jit_compile=True)
    fit(watched, x, y, GradWatch(run_dir=tmp_path / "run", activations=True, stats_every=2))
    assert difference(fit(_mixed(jit_compile=True), x, y), watched) == 0.0
    assert len(sampled(tmp_path / "run", "activation_mean")) == 4


def test_outputs_of_a_model_that_was_not_built_are_sampled(tmp_path: Path) -> None:
    x, y = data(8)
    fit(_mixed(built=False), x, y, GradWatch(run_dir=tmp_path / "run", activations=True), epochs=1)
    assert sampled(tmp_path / "run", "activation_mean").notna().all(axis=None)


def test_dying_units_are_found(tmp_path: Path) -> None:
    x, y = data(48)
    watch = GradWatch(run_dir=tmp_path / "run", activations=True, stats_every=1)
    model = _mixed()
    model.layers[1].bias.assign([-100.0] * 6)
    fit(model, x, y, watch, epochs=1)
    assert "dying_relu" in {finding.rule for finding in watch.findings}


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is PyTorch's")
def test_outputs_inside_a_compiled_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'activations' must be False for a compiled model"):
        fit(_mixed(jit_compile=True), *data(4), GradWatch(run_dir=tmp_path / "run", activations=True))


@pytest.mark.skipif(BACKEND != "jax", reason="JAX hands nothing out of a step that the step does not return")
def test_outputs_inside_a_train_step_of_ones_own_are_refused(tmp_path: Path) -> None:
    class Own(keras.Model):  # type: ignore[misc]  # Keras has no types
        def train_step(self, *args: Any) -> Any:
            return super().train_step(*args)

    inner = dense()
    model = Own(inner.input, inner.output)
    model.compile("sgd", "mse")
    with pytest.raises(ConfigurationError, match="a train_step of your own on JAX"):
        fit(model, *data(4), GradWatch(run_dir=tmp_path / "run", activations=True))
