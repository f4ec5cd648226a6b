"""Small trainings, and what automatic differentiation of the framework itself says of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np

from gradwatch.reader import RunReader
from gradwatch.records import Finding, StepBatch

BACKEND = keras.backend.backend()
EXACT = 1e-6
Batch = tuple[np.ndarray, np.ndarray]
Detect = Callable[[StepBatch], Iterable[Finding]]


def data(n: int = 22, *, inputs: int = 6, outputs: int = 2) -> Batch:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, inputs)).astype("float32"), rng.normal(size=(n, outputs)).astype("float32")


def dense(**kwargs: Any) -> keras.Model:
    """A model of two layers, always with the same weights."""
    layers = keras.layers
    with_seed = [keras.initializers.GlorotUniform(seed=seed) for seed in (1, 2)]
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, activation="tanh", kernel_initializer=with_seed[0], name="hidden")(inputs)
    outputs = layers.Dense(2, kernel_initializer=with_seed[1], name="out", dtype="float32")(hidden)
    model = keras.Model(inputs, outputs)
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": "mse", "jit_compile": False, **kwargs})
    return model


def batches(x: Any, y: Any, size: int = 4, *, epochs: int = 1) -> Iterator[Batch]:
    for _ in range(epochs):
        for start in range(0, len(x), size):
            yield x[start : start + size], y[start : start + size]


def gradients(model: keras.Model, x: Any, y: Any) -> list[np.ndarray | None]:
    """The gradient of the model's loss, one array per trainable variable; None for none.

    A dynamic loss scale is applied as in the training, which matters in half precision, and taken out again.
    """
    held = getattr(getattr(model, "optimizer", None), "dynamic_scale", 1.0)
    scale = np.float32(keras.ops.convert_to_numpy(held))
    grads = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}[BACKEND](model, x, y, scale)
    return [None if grad is None else np.asarray(grad, np.float64) / scale for grad in grads]


def _tensorflow(model: keras.Model, x: Any, y: Any, scale: np.float32) -> list[Any]:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = scale * model.compute_loss(x=x, y=y, y_pred=model(x, training=True))
    grads = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    return [None if grad is None else tf.convert_to_tensor(grad).numpy() for grad in grads]


def _torch(model: keras.Model, x: Any, y: Any, scale: np.float32) -> list[Any]:
    model.zero_grad()
    loss = model.compute_loss(x=x, y=keras.ops.convert_to_tensor(y), y_pred=model(x, training=True))
    (loss * float(scale)).backward()
    grads = [variable.value.grad for variable in model.trainable_variables]
    return [None if grad is None else grad.detach().float().numpy().copy() for grad in grads]


def _jax(model: keras.Model, x: Any, y: Any, scale: np.float32) -> list[Any]:
    import jax

    def loss(trained: list[Any], others: list[Any], x: Any, y: Any, scale: Any) -> Any:
        held = zip([*model.trainable_variables, *model.non_trainable_variables], [*trained, *others], strict=True)
        with keras.StatelessScope(state_mapping=list(held)):
            return scale * model.compute_loss(x=x, y=y, y_pred=model(x, training=True))

    if model not in _compiled_gradients:
        _compiled_gradients[model] = jax.jit(jax.grad(loss))
    values = [[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)]
    grads: list[Any] = _compiled_gradients[model](*values, x, y, scale)
    return grads


_compiled_gradients: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def norms(grads: list[np.ndarray | None]) -> list[float]:
    return [np.nan if grad is None else float(np.sqrt(np.sum(np.square(grad)))) for grad in grads]


def reference(model: keras.Model, steps: Iterator[Batch]) -> np.ndarray:
    """Norms before each step of a training by `train_on_batch`; shape (steps, trainable variables)."""
    found = []
    for x, y in steps:
        found.append(norms(gradients(model, x, y)))
        model.train_on_batch(x, y)
    return np.array(found)


def recorded(run_dir: Path) -> np.ndarray:
    """The norms in the record, shape (steps, columns), NaN where none was measured."""
    return RunReader(run_dir).grad_norms().to_numpy(np.float64)


def metrics(run_dir: Path) -> Any:
    return RunReader(run_dir).metrics()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest error relative to the reference, or to a hundredth of the largest norm where that is more.

    A gradient that is zero but for rounding, as of a bias before batch normalisation, has no digits to compare.
    """
    assert found.shape == expected.shape
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    scale = np.maximum(np.abs(expected), 1e-2 * np.nanmax(np.abs(expected)))
    return float(np.nanmax(np.abs(found - expected) / scale))


def difference(one: keras.Model, other: keras.Model) -> float:
    """Largest difference of their weights."""
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return max(float(np.max(np.abs(a.astype(np.float64) - b))) if a.size else 0.0 for a, b in pairs)


def fit(model: keras.Model, x: Any, y: Any, *callbacks: Any, **kwargs: Any) -> keras.Model:
    model.fit(x, y, **{"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, **kwargs}, callbacks=[*callbacks])
    return model


def found_at(step: int, rule: str = "exploding") -> Detect:
    """A detector that finds something at one step, and sees it gone at the next."""

    def detect(batch: StepBatch) -> Iterable[Finding]:
        finding = Finding("f", rule, "critical", first_step=step, last_step=step)
        if step in batch.step:
            yield finding

    return detect
