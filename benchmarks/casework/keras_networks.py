"""Networks of the published cases as Keras models: the layers of a specification, one for one.

Weights are drawn from the distributions that the specification names, by the initializers of Keras.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

Spec = Mapping[str, Any]
layers, initializers = keras.layers, keras.initializers

#: Scheme to initializer, given the number in its name, fan-in and fan-out; the schemes of `networks.SCHEMES`.
SCHEMES: dict[str, Callable[[float, int, int], Any]] = {
    "zeros": lambda number, n, m: initializers.Zeros(),
    "ones": lambda number, n, m: initializers.Ones(),
    "const": lambda number, n, m: initializers.Constant(number),
    "normal": lambda number, n, m: initializers.RandomNormal(stddev=number),
    "trunc": lambda number, n, m: initializers.TruncatedNormal(stddev=number),
    "uniform": lambda number, n, m: _symmetric(number),
    "glorot_uniform": lambda number, n, m: _symmetric(math.sqrt(6 / (n + m))),
    "he_uniform": lambda number, n, m: _symmetric(math.sqrt(6 / n)),
    "he_normal": lambda number, n, m: initializers.RandomNormal(stddev=math.sqrt(2 / n)),
    "lecun_normal": lambda number, n, m: initializers.RandomNormal(stddev=math.sqrt(1 / n)),
    "mf": lambda number, n, m: initializers.RandomNormal(stddev=math.sqrt(number / n)),
    "torch": lambda number, n, m: _symmetric(1 / math.sqrt(n)),
}


def _symmetric(limit: float) -> Any:
    return initializers.RandomUniform(-limit, limit)


def initializer(scheme: str | None, *, fan_in: int, fan_out: int) -> Any:
    """What a scheme's name stands for, as in `networks.initialize`."""
    name, _, number = (scheme or "zeros").partition(":")
    return SCHEMES[name](float(number or 0), fan_in, fan_out)


def build(specs: Sequence[Spec], shape: Sequence[int]) -> keras.Model:
    """The network of a layer list.

    Args:
        specs: The layers.
        shape: Of one sample, as the data have it; images are (height, width, channels).
    """
    if specs[0]["t"] == "vae":
        return VariationalAutoencoder(shape[0], hidden=specs[0]["h"], latent=specs[0]["z"])
    inputs = output = keras.Input(tuple(shape))
    for spec in specs:
        output = LAYERS[spec["t"]](spec, output.shape[1:])(output)
    return keras.Model(inputs, output)


def _weights(spec: Spec, *, fan_in: int, fan_out: int) -> dict[str, Any]:
    fans = {"fan_in": fan_in, "fan_out": fan_out}
    return {
        "activation": spec["act"],
        "use_bias": spec["b"] is not None,
        "kernel_initializer": initializer(spec["w"], **fans),
        "bias_initializer": initializer(spec["b"], **fans),
    }


def _dense(spec: Spec, shape: Sequence[int]) -> Any:
    return layers.Dense(spec["n"], **_weights(spec, fan_in=shape[-1], fan_out=spec["n"]))


def _conv(spec: Spec, shape: Sequence[int]) -> Any:
    width, kernel = spec["n"], spec["k"]
    options = _weights(spec, fan_in=shape[-1] * kernel**2, fan_out=width * kernel**2)
    return layers.Conv2D(width, kernel, padding=spec.get("pad", "valid"), **options)


def _rnn(spec: Spec, shape: Sequence[int]) -> Any:
    if spec["cell"] == "lstm":
        return layers.LSTM(spec["n"])
    uniform = initializer("torch", fan_in=shape[-1], fan_out=spec["n"])
    return layers.SimpleRNN(
        spec["n"],
        activation=spec["act"],
        kernel_initializer=uniform,
        bias_initializer=uniform,
        recurrent_initializer=initializers.Orthogonal(gain=spec["rho"]),
    )


LAYERS: dict[str, Callable[[Spec, Sequence[int]], Any]] = {
    "dense": _dense,
    "conv": _conv,
    "maxpool": lambda spec, shape: layers.MaxPooling2D(spec["k"]),
    "flatten": lambda spec, shape: layers.Flatten(),
    "dropout": lambda spec, shape: layers.Dropout(spec["p"]),
    "bn": lambda spec, shape: layers.BatchNormalization(),
    "rnn": _rnn,
}


class VariationalAutoencoder(keras.Model):  # type: ignore[misc]  # Keras has no types
    """One hidden layer each way (Kingma & Welling 2014); gives the picture, mean and log variance side by side."""

    def __init__(self, size: int, *, hidden: int, latent: int) -> None:
        super().__init__()
        self.size, self.latent = size, latent
        self.encoder = layers.Dense(hidden, activation="relu")
        self.mean = layers.Dense(latent)
        self.log_variance = layers.Dense(latent)
        self.decoder = layers.Dense(hidden, activation="relu")
        self.picture = layers.Dense(size, activation="sigmoid")
        self.noise = keras.random.SeedGenerator()

    def call(self, x: Any) -> Any:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        drawn = keras.random.normal(keras.ops.shape(mean), seed=self.noise)
        code = mean + drawn * keras.ops.exp(0.5 * log_variance)
        return keras.ops.concatenate([self.picture(self.decoder(code)), mean, log_variance], axis=1)
