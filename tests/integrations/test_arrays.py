"""`Watcher.observe` for a net that gradwatch knows nothing of: plain numpy, in the manner of Caffe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gradwatch as gw
from tests.integrations import plain

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Blob:
    """Values and their gradient, as Caffe holds them."""

    data: Array
    diff: Array


class Net:
    """The plain model: two layers of two blobs each, with a backward pass of its own."""

    def __init__(self) -> None:
        arrays = [parameter.detach().numpy().astype(np.float64) for parameter in plain.model().parameters()]
        blobs = [Blob(array, np.zeros_like(array)) for array in arrays]
        self.params = {"ip1": blobs[:2], "ip2": blobs[2:]}

    def backward(self, x: Array, y: Array) -> float:
        (w1, b1), (w2, b2) = self.params["ip1"], self.params["ip2"]
        hidden = np.tanh(x @ w1.data.T + b1.data)
        error = hidden @ w2.data.T + b2.data - y
        top = 2 * error / error.size
        below = (top @ w2.data) * (1 - hidden**2)
        w2.diff, b2.diff, w1.diff, b1.diff = top.T @ hidden, top.sum(0), below.T @ x, below.sum(0)
        return float(np.mean(error**2))


def train(run_dir: Path, *, rate: float = plain.RATE, epochs: int = 1, **settings: Any) -> list[float]:
    """The rates that were used."""
    net, rates = Net(), []
    x, y = (part.numpy().astype(np.float64) for part in plain.data())
    parameters = [
        gw.Parameter(f"{name}.{i}", shape=blob.diff.shape, layer=name, depth=depth)
        for depth, (name, blobs) in enumerate(net.params.items())
        for i, blob in enumerate(blobs)
    ]
    factor = 1.0
    with gw.Watcher(parameters, framework="caffe", run_dir=run_dir, **settings) as watcher:
        for step in range(epochs * plain.STEPS):
            rows = slice(step % plain.STEPS * plain.BATCH, (step % plain.STEPS + 1) * plain.BATCH)
            loss = net.backward(x[rows], y[rows])
            blobs = [blob for layer in net.params.values() for blob in layer]
            rates.append(rate * factor)
            for blob in blobs:
                blob.data = blob.data - rate * factor * blob.diff
            for due in watcher.observe(
                grad_norm=np.array([np.linalg.norm(blob.diff) for blob in blobs]), loss=loss, lr=rate
            ):
                if due.lr_factor is not None:
                    factor = due.lr_factor
                    watcher.applied(due)
    return rates


def test_norms_and_losses_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    train(tmp_path / "arrays")
    plain.train(tmp_path / "plain")

    np.testing.assert_allclose(plain.norms(tmp_path / "arrays"), plain.norms(tmp_path / "plain"), rtol=2e-5)
    np.testing.assert_allclose(plain.losses(tmp_path / "arrays"), plain.losses(tmp_path / "plain"), rtol=2e-5)
    assert list(gw.load(tmp_path / "arrays").grad_norms(by="layer")) == ["ip1", "ip2"]


def test_a_rate_that_is_lowered_as_asked_is_the_one_in_the_record(tmp_path: Path) -> None:
    rates = train(tmp_path / "arrays", rate=2.0, epochs=5, actions=[gw.DecayLR()])

    metrics = gw.load(tmp_path / "arrays").metrics()
    assert metrics["lr_factor"].min() <= 0.5
    np.testing.assert_allclose(metrics["lr"] * metrics["lr_factor"], rates)
