"""What watching costs a Keras training: the time of a step with the callback over the time of one without.

Two equal models train in two threads of one process, and only one of them runs at a time: an epoch of the one, an epoch
of the other, in changing order. Each pair gives a ratio, the median over the pairs is the result; plain against plain
shows how far to trust it.

    KERAS_BACKEND=jax python benchmarks/overhead_keras.py --jit
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from gradwatch.keras import GradWatch

layers = keras.layers


def dense50(batch: int) -> tuple[keras.Model, Any, Any]:
    """50 layers of 128 units, 102 variables."""
    parts = [keras.Input((128,)), *(layers.Dense(128, "relu") for _ in range(50)), layers.Dense(10)]
    return keras.Sequential(parts), np.zeros((batch, 128), "float32"), np.zeros(batch, "int32")


def conv(batch: int) -> tuple[keras.Model, Any, Any]:
    """The small convolutional network of the Keras examples (F. Chollet, Simple MNIST convnet)."""
    parts = [
        keras.Input((28, 28, 1)), layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(2),
        layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D(2), layers.Flatten(), layers.Dense(10),
    ]  # fmt: skip
    return keras.Sequential(parts), np.zeros((batch, 28, 28, 1), "float32"), np.zeros(batch, "int32")


#: Name to model and batch size.
NETWORKS: dict[str, tuple[Callable[[int], tuple[keras.Model, Any, Any]], int]] = {
    "conv": (conv, 32),
    "dense50": (dense50, 128),
}


class Turns(keras.callbacks.Callback):
    """Lets an epoch begin only when it is this training's turn, and takes its time."""

    def __init__(self, me: int, table: Table) -> None:
        super().__init__()
        self.me, self.table = me, table

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.table.wait_for(self.me)
        self.started = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.table.done(self.me, wall, cpu)


class Table:
    """Whose turn it is, and how long the turns took.

    Args:
        rounds: Number of turns of each.
    """

    def __init__(self, rounds: int) -> None:
        self._order = [who for turn in range(rounds) for who in ((0, 1), (1, 0))[turn % 2]]
        self._free = threading.Condition()
        self.wall: dict[int, list[float]] = {0: [], 1: []}
        self.cpu: dict[int, list[float]] = {0: [], 1: []}

    def wait_for(self, me: int) -> None:
        """Block until it is the turn of `me`."""
        with self._free:
            self._free.wait_for(lambda: self._order and self._order[0] == me)

    def done(self, me: int, wall: float, cpu: float) -> None:
        """Note a turn; the other goes on."""
        with self._free:
            self.wall[me].append(wall)
            self.cpu[me].append(cpu)
            self._order.pop(0)
            self._free.notify_all()


def ratio(times: dict[int, list[float]], *, warm: int) -> float:
    """Median over the rounds of watched / plain."""
    return statistics.median(b / a for a, b in zip(times[0][warm:], times[1][warm:], strict=True))


def measure(network: str, *, jit: bool, rounds: int, steps: int, watched: bool) -> dict[str, float]:
    """Train both; ratios of wall time and of processor time."""
    build, batch = NETWORKS[network]
    table = Table(rounds)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tempfile.TemporaryDirectory() as folder:
        threads = []
        for me in (0, 1):
            model, x, y = build(batch)
            x, y = np.repeat(x, steps, 0) + np.float32(0.1), np.repeat(y, steps, 0)
            model.compile("adam", loss, jit_compile=jit)
            watch = [GradWatch(run_dir=Path(folder) / "run")] if me and watched else []
            fit = {"batch_size": batch, "epochs": rounds, "verbose": 0, "callbacks": [Turns(me, table), *watch]}
            threads.append(threading.Thread(target=model.fit, args=(x, y), kwargs=fit))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    plain = 1000 * statistics.median(table.wall[0][2:]) / steps
    return {"cpu": ratio(table.cpu, warm=2), "wall": ratio(table.wall, warm=2), "plain_ms": plain}


def main() -> None:
    """Print one line of JSON per network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jit", action="store_true", help="compile the step (XLA, or torch.compile)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    options = parser.parse_args()
    for network in options.network or NETWORKS:
        common = {"jit": options.jit, "rounds": options.rounds, "steps": options.steps}
        control = measure(network, watched=False, **common)
        found = measure(network, watched=True, **common)
        line = {"backend": keras.backend.backend(), "network": network, "jit": options.jit, **found}
        print(json.dumps({**line, "control_cpu": control["cpu"], "control_wall": control["wall"]}), flush=True)


if __name__ == "__main__":
    main()
