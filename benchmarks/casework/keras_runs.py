"""The published cases trained by Keras' own `fit`, recorded by `gradwatch.keras.GradWatch`."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from benchmarks.casework import data
from benchmarks.casework.case import Losses
from benchmarks.casework.keras_networks import build
from benchmarks.casework.losses import EPSILON
from benchmarks.casework.training import NONFINITE_LOSSES, SECONDS
from gradwatch.keras import GradWatch
from gradwatch.reader import RunReader
from gradwatch.records import StepBatch

Spec = Mapping[str, Any]
Tensor = Any


def bce(target: Tensor, output: Tensor) -> Tensor:
    p = ops.clip(output, EPSILON, 1 - EPSILON)
    return -ops.mean(target * ops.log(p) + (1 - target) * ops.log(1 - p))


def cce(target: Tensor, output: Tensor) -> Tensor:
    p = ops.clip(output / ops.sum(output, axis=1, keepdims=True), EPSILON, 1 - EPSILON)
    return -ops.mean(ops.sum(target * ops.log(p), axis=1))


def cce_logits(target: Tensor, output: Tensor) -> Tensor:
    return -ops.mean(ops.sum(target * ops.log_softmax(output, axis=1), axis=1))


def cce_raw_sum(target: Tensor, output: Tensor) -> Tensor:
    return -ops.sum(target * ops.log(ops.softmax(output, axis=1)))


def mse(target: Tensor, output: Tensor) -> Tensor:
    return ops.mean(ops.square(output - target))


def mae(target: Tensor, output: Tensor) -> Tensor:
    return ops.mean(ops.abs(output - target))


def vae(target: Tensor, output: Tensor) -> Tensor:
    size = target.shape[1]
    latent = (output.shape[1] - size) // 2
    picture, mean, log_variance = ops.split(output, [size, size + latent], axis=1)
    p = ops.clip(picture, EPSILON, 1 - EPSILON)
    reconstruction = -ops.sum(target * ops.log(p) + (1 - target) * ops.log(1 - p))
    return reconstruction - 0.5 * ops.sum(1 + log_variance - ops.square(mean) - ops.exp(log_variance))


def loss_of(name: str, count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of `losses.LOSSES` in Keras' operations; `count` is the number of samples in the whole set."""
    if name == "half_mse_sum_T":
        return lambda target, output: ops.sum(ops.square(output - target)) / (2 * count)
    known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        loss.__name__: loss for loss in (bce, cce, cce_logits, cce_raw_sum, mse, mae, vae)
    }
    return known[name]


def optimizer_of(options: Spec) -> keras.optimizers.Optimizer:
    """The optimizer of a specification, with Keras' defaults."""
    rate, own = _rate(options), {"global_clipnorm": options.get("clip")}
    match options["name"]:
        case "sgd":
            momentum, nesterov = options.get("momentum", 0.0), options.get("nesterov", False)
            return keras.optimizers.SGD(rate, momentum=momentum, nesterov=nesterov, **own)
        case "adam":
            betas = {"beta_1": options.get("b1", 0.9), "beta_2": options.get("b2", 0.999)}
            return keras.optimizers.Adam(rate, **betas, epsilon=options.get("eps", 1e-7), **own)
        case "rmsprop":
            return keras.optimizers.RMSprop(rate, rho=options.get("rho", 0.9), **own)
        case "adagrad":
            return keras.optimizers.Adagrad(rate, **own)
        case "adadelta":
            return keras.optimizers.Adadelta(rate, **own)
    raise ValueError(f"unknown optimizer: {options['name']!r}")


def _rate(options: Spec) -> Any:
    rate = options["lr"]
    schedules = keras.optimizers.schedules
    if options.get("schedule") == "exp":
        return schedules.ExponentialDecay(rate, max(1, options["num_it"] - 1), options["lr_end"] / rate)
    return schedules.InverseTimeDecay(rate, 1, options["decay"]) if options.get("decay") else rate


class Ends(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Ends a run early, as `training.run` does: when its losses are no numbers any more, or when it takes too long."""

    def __init__(self) -> None:
        super().__init__()
        self.bad, self.started = 0, time.process_time()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.bad += not math.isfinite(float(logs["loss"]))  # the mean so far: it stays what it is
        if self.bad > NONFINITE_LOSSES or time.process_time() - self.started > SECONDS:
            self.model.stop_training = True


def watched(spec: Spec, seed: int) -> tuple[StepBatch, Losses]:
    """What the callback records of a run, and the loss of each batch."""
    from benchmarks.casework.recording import joined

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    x, y = (np.asarray(array, "float32") for array in data.load(spec["data"], seed))
    x = np.moveaxis(x, 1, -1) if x.ndim == 4 else x
    y = x if spec["loss"] == "vae" else y
    count, size = len(x), min(spec["batch"], len(x))
    steps = min(spec["max_steps"], spec["epochs"] * math.ceil(count / size))
    model = build(spec["layers"], x.shape[1:])
    model.compile(optimizer_of(spec["opt"]), loss_of(spec["loss"], count), jit_compile=False)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        watch = GradWatch(run_dir=run_dir, detectors=[])
        # All epochs as one: many cases have but a few batches in each, and Keras takes its time between epochs.
        batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(count, seed=seed).batch(size).repeat()
        model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=[watch, Ends()])
        batch = joined(list(RunReader(run_dir).batches(1_000_000)))
    return batch, np.asarray(batch.metric("loss"), np.float64)
