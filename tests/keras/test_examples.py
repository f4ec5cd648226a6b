"""Published Keras examples, written anew from their descriptions: they run with the callback added and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from gradwatch.keras import GradWatch
from gradwatch.reader import RunReader
from tests.keras.training import BACKEND

layers = keras.layers


def _is_sound(run_dir: Path, steps: int) -> RunReader:
    run = RunReader(run_dir)
    norms = run.grad_norms().to_numpy()
    assert len(norms) == steps
    assert np.isfinite(norms).all()
    assert run.info.overhead["errors"] == {}
    return run


def test_the_simple_mnist_convnet(tmp_path: Path) -> None:
    """keras.io, Simple MNIST convnet (F. Chollet); here on 8 x 8 digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images[..., None] / 16.0).astype("float32")[:512]
    y = keras.utils.to_categorical(digits.target[:512], 10)
    model = keras.Sequential(
        [
            keras.Input(shape=(8, 8, 1)),
            layers.Conv2D(8, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Conv2D(16, kernel_size=(2, 2), activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
    watch = GradWatch(run_dir=tmp_path / "run")
    model.fit(x, y, batch_size=64, epochs=2, validation_split=0.125, verbose=0, callbacks=[watch])
    run = _is_sound(tmp_path / "run", 14)
    assert run.parameters()["kind"].tolist() == ["Conv2D"] * 4 + ["Dense"] * 2
    assert run.parameters()["activation"].iloc[0] == "ReLU"


def test_a_bidirectional_lstm_on_text(tmp_path: Path) -> None:
    """keras.io, Bidirectional LSTM on IMDB (F. Chollet); here on synthetic reviews."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 64)
    x = rng.integers(2, 40, size=(64, 12)) * 2 + y[:, None]
    inputs = keras.Input(shape=(None,), dtype="int32")
    hidden = layers.Embedding(100, 8)(inputs)
    hidden = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(hidden)
    hidden = layers.Bidirectional(layers.LSTM(4))(hidden)
    model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(hidden))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    watch = GradWatch(run_dir=tmp_path / "run")
    model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[watch])
    assert set(_is_sound(tmp_path / "run", 8).parameters()["kind"]) == {"Embedding", "LSTM", "Dense"}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the example is written with tf.GradientTape")
def test_a_variational_autoencoder(tmp_path: Path) -> None:
    """keras.io, Variational AutoEncoder (F. Chollet): a custom train step with a tape and metrics of its own."""
    import tensorflow as tf

    class VAE(keras.Model):  # type: ignore[misc]  # Keras has no types
        def __init__(self) -> None:
            super().__init__()
            self.encoder = keras.Sequential([keras.Input((16,)), layers.Dense(8, activation="relu"), layers.Dense(4)])
            self.decoder = keras.Sequential(
                [keras.Input((2,)), layers.Dense(8, activation="relu"), layers.Dense(16, activation="sigmoid")]
            )
            self.seeds = keras.random.SeedGenerator(1)
            self.loss_tracker = keras.metrics.Mean(name="loss")

        @property
        def metrics(self) -> list[Any]:
            return [self.loss_tracker]

        def train_step(self, data: Any) -> dict[str, Any]:
            with tf.GradientTape() as tape:
                mean, log_variance = tf.split(self.encoder(data), 2, axis=1)
                noise = keras.random.normal(tf.shape(mean), seed=self.seeds)
                image = self.decoder(mean + tf.exp(0.5 * log_variance) * noise)
                reconstruction = tf.reduce_mean(tf.reduce_sum(keras.losses.binary_crossentropy(data, image)))
                divergence = -0.5 * (1 + log_variance - tf.square(mean) - tf.exp(log_variance))
                loss = reconstruction + tf.reduce_mean(tf.reduce_sum(divergence, axis=1))
            grads = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
            self.loss_tracker.update_state(loss)
            return {"loss": self.loss_tracker.result()}

    x = np.random.default_rng(0).uniform(size=(64, 16)).astype("float32")
    model = VAE()
    model.compile(optimizer=keras.optimizers.Adam())
    model.fit(x, epochs=2, batch_size=16, verbose=0, callbacks=[GradWatch(run_dir=tmp_path / "run")])
    assert len(_is_sound(tmp_path / "run", 8).parameters()) == 8
