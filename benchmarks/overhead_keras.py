"""What watching costs a Keras training: the time of a step with the callback over the time of one without.

Equal models train in threads of one process, and only one of them runs at a time: each in turn for an epoch, in an
order that is drawn anew for each round. A round gives the ratio of each to the plain training; the result is the median
over the rounds, with its 95 % interval, of processor time and of wall time. `control` is plain as well and shows how
far to trust the others; `unsampled` takes no samples, so that `watched` less `unsampled` is what samples cost; `repair`
has that preset. The calls that Python makes more per step do not depend on the machine.

    KERAS_BACKEND=jax python -m benchmarks.overhead_keras --jit
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from benchmarks.machine import machine
from gradwatch.keras import GradWatch

layers = keras.layers

RESULTS = Path(__file__).parent / "results"
#: Name to the settings of the callback; None trains without it.
TRAININGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "control": None,
    "watched": {},
    "unsampled": {"stats_every": 10**9},
    "repair": {"actions": "repair"},
}
#: Rounds that do not count: compiling, first touches.
WARM = 2


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

    def __init__(self, me: str, table: Table) -> None:
        super().__init__()
        self.me, self.table = me, table

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.table.wait_for(self.me)
        self.started = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.table.done(self.me, wall=wall, cpu=cpu)


class Table:
    """Whose turn it is, and how long the turns took.

    Args:
        names: Of the trainings.
        rounds: Number of turns of each.
    """

    def __init__(self, names: Sequence[str], rounds: int) -> None:
        draw = random.Random(0)  # noqa: S311 -- an order of turns, no secret
        self._order = [name for _ in range(rounds) for name in draw.sample(names, len(names))]
        self._free = threading.Condition()
        self.times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}

    def wait_for(self, me: str) -> None:
        """Block until it is the turn of `me`."""
        with self._free:
            self._free.wait_for(lambda: self._order and self._order[0] == me)

    def done(self, me: str, **times: float) -> None:
        """Note a turn; the next goes on."""
        with self._free:
            for kind, seconds in times.items():
                self.times[me][kind].append(seconds)
            self._order.pop(0)
            self._free.notify_all()

    def ratio(self, name: str, kind: str) -> tuple[float, float, float]:
        """Median over the rounds of this training's time over that of the plain one, and its 95 % interval."""
        pairs = zip(self.times["plain"][kind][WARM:], self.times[name][kind][WARM:], strict=True)
        ratios = sorted(mine / plain for plain, mine in pairs)
        count = len(ratios)
        spread = round(0.98 * count**0.5)  # ranks of a binomial with p = 1/2
        low, high = max(0, count // 2 - spread), min(count - 1, count // 2 + spread)
        return statistics.median(ratios), ratios[low], ratios[high]


def training(network: str, *, jit: bool, steps: int) -> tuple[keras.Model, Any, Any, int]:
    """A compiled model, and the data of an epoch."""
    build, batch = NETWORKS[network]
    model, x, y = build(batch)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=jit)
    return model, np.repeat(x, steps, 0) + np.float32(0.1), np.repeat(y, steps, 0), batch


def watching(name: str, folder: str) -> list[GradWatch]:
    """The callback of a training, if it has one."""
    settings = TRAININGS[name]
    return [] if settings is None else [GradWatch(run_dir=Path(folder) / name, **settings)]


def measure(network: str, names: Sequence[str], *, jit: bool, rounds: int, steps: int) -> Table:
    """Train all in turn."""
    table = Table(names, rounds)
    with tempfile.TemporaryDirectory() as folder:
        threads = []
        for name in names:
            model, x, y, batch = training(network, jit=jit, steps=steps)
            callbacks = [Turns(name, table), *watching(name, folder)]
            fit = {"batch_size": batch, "epochs": rounds, "verbose": 0, "callbacks": callbacks}
            threads.append(threading.Thread(target=model.fit, args=(x, y), kwargs=fit))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return table


class Calls(keras.callbacks.Callback):
    """Counts calls of Python and C functions in the second epoch, in the thread of the training."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _note(self, frame: object, event: str, arg: object) -> None:
        self.count += event in ("call", "c_call")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            sys.setprofile(self._note)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        sys.setprofile(None)


def calls(network: str, name: str, *, jit: bool, steps: int) -> float:
    """Calls per step."""
    counter = Calls()
    with tempfile.TemporaryDirectory() as folder:
        model, x, y, batch = training(network, jit=jit, steps=steps)
        model.fit(x, y, batch_size=batch, epochs=2, verbose=0, callbacks=[*watching(name, folder), counter])
    return counter.count / steps


def main() -> None:
    """Print a line per network and training, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jit", action="store_true", help="compile the step (XLA, or torch.compile)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--training", choices=list(TRAININGS)[1:], action="append", help="by default all")
    options = parser.parse_args()
    backend = keras.backend.backend()
    names = ["plain", *(options.training or list(TRAININGS)[1:])]
    where = machine("keras", packages_distributions()[backend][0])
    result: dict[str, Any] = {"machine": where, "jit": options.jit, "networks": {}}
    for network in options.network or NETWORKS:
        table = measure(network, names, jit=options.jit, rounds=options.rounds, steps=options.steps)
        plain_calls = calls(network, "plain", jit=options.jit, steps=options.steps)
        plain_ms = 1000 * statistics.median(table.times["plain"]["wall"][WARM:]) / options.steps
        lines: dict[str, Any] = {"plain": {"ms": plain_ms, "calls": plain_calls}}
        for name in names[1:]:
            line: dict[str, Any] = {kind: table.ratio(name, kind) for kind in ("cpu", "wall")}
            line["calls"] = calls(network, name, jit=options.jit, steps=options.steps) - plain_calls
            lines[name] = line
            shown = "  ".join(
                f"{kind} {line[kind][0]:.3f} [{line[kind][1]:.3f}, {line[kind][2]:.3f}]" for kind in ("cpu", "wall")
            )
            print(
                f"{backend} {network} {name:10} {shown}  calls {line['calls']:+.0f}  (plain {plain_ms:.1f} ms)",
                flush=True,
            )
        result["networks"][network] = lines
    file = RESULTS / f"overhead-keras-{backend}{'-jit' if options.jit else ''}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
