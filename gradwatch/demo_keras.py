"""`gradwatch demo --framework keras`: the network of the PyTorch demo in Keras, trained the same three times."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch import demo
from gradwatch.demo import Act, Outcome
from gradwatch.errors import MissingDependencyError

if TYPE_CHECKING:
    from rich.progress import Progress


def run_demo(root: Path, *, progress: Progress, seed: int = 0) -> list[Outcome]:
    """Train all acts below `root`, on the backend that `KERAS_BACKEND` names.

    Args:
        root: Directory for the three run directories; existing ones are replaced.
        progress: Shows a bar for each.
        seed: Of the weights and of the order of the digits.

    Raises:
        MissingDependencyError: Keras is not installed.
    """
    try:
        import keras  # noqa: F401 -- to say what is missing before anything is trained
    except ImportError:
        raise MissingDependencyError.of("keras", extra="tensorflow") from None
    import numpy as np

    images, labels = demo.digits()
    order = np.random.default_rng(seed).permutation(len(images))
    data = (images[..., None][order], labels[order])
    return [_train(act, root / act.name, data, progress, seed=seed) for act in demo.acts()]


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


def _train(act: Act, run_dir: Path, data: tuple[Any, Any], progress: Progress, *, seed: int) -> Outcome:
    import keras
    import numpy as np

    from gradwatch.integrations.keras import GradWatch
    from gradwatch.reader import RunReader

    (x, x_test), (y, y_test) = (np.split(part, [demo.TRAINED]) for part in data)
    keras.utils.set_random_seed(seed)
    model = build_model()
    model.compile(
        keras.optimizers.SGD(act.rate, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    task = progress.add_task(act.title, total=demo.EPOCHS)
    watch = GradWatch(run_dir=run_dir, overwrite=True, actions=act.actions)
    bar = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: progress.update(task, advance=1))
    started = time.perf_counter()
    model.fit(x, y, batch_size=demo.BATCH, epochs=demo.EPOCHS, verbose=0, callbacks=[watch, bar])
    seconds = time.perf_counter() - started
    accuracy = float(np.mean(np.argmax(model.predict(x_test, verbose=0), axis=1) == y_test))
    final_loss = float(RunReader(run_dir).metrics()["loss"].iloc[-20:].mean(skipna=False))
    return Outcome(act, run_dir, accuracy, final_loss, seconds)
