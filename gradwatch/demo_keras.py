"""`gradwatch demo --framework keras`: the network of the PyTorch demo in Keras, trained the same three times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    from gradwatch.demo import Act, Outcome


def build_model() -> Any:
    """A convolutional network with nine weight layers and no normalisation: deep enough to be hurt."""
    import keras

    layers, he = keras.layers, "he_normal"
    parts: list[Any] = [keras.Input((28, 28, 1))]
    for block, width in enumerate((8, 16, 32), 1):
        for part in "ab":
            name = f"conv{block}{part}"
            parts.append(layers.Conv2D(width, 3, padding="same", activation="relu", kernel_initializer=he, name=name))
        parts.append(layers.MaxPooling2D(2))
    parts.append(layers.Flatten())
    parts += [layers.Dense(64, "relu", kernel_initializer=he, name=name) for name in ("fc1", "fc2")]
    return keras.Sequential([*parts, layers.Dense(10, kernel_initializer=he, name="out")])


def train(
    act: Act, run_dir: Path, data: Sequence[npt.NDArray[Any]], *, epochs: int, batch: int, callbacks: Sequence[Any] = ()
) -> Outcome:
    """Train one act.

    Args:
        act: Which.
        run_dir: Where it is recorded; a run that is there is replaced.
        data: Training images of shape (n, 28, 28, 1), labels, test images, labels.
        epochs: Passes over the training images.
        batch: Images in a step.
        callbacks: Further callbacks, such as one that shows progress.
    """
    import keras
    import numpy as np

    from gradwatch.demo import Outcome
    from gradwatch.integrations.keras import GradWatch

    x, y, x_test, y_test = data
    keras.utils.set_random_seed(0)
    model = build_model()
    model.compile(
        keras.optimizers.SGD(act.rate, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    watch = GradWatch(run_dir=run_dir, overwrite=True, actions=act.actions)
    started = time.perf_counter()
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0, callbacks=[watch, *callbacks])
    seconds = time.perf_counter() - started
    accuracy = float(np.mean(np.argmax(model.predict(x_test, verbose=0), axis=1) == y_test))
    losses = _last_losses(run_dir)
    return Outcome(act, run_dir, accuracy, losses, seconds)


def _last_losses(run_dir: Path) -> float:
    from gradwatch.reader import RunReader

    return float(RunReader(run_dir).metrics()["loss"].iloc[-20:].mean(skipna=False))
