"""No framework at all: gradients written by hand, and a remedy applied by hand."""

import numpy as np

import gradwatch as gw

rng = np.random.default_rng(0)
x = rng.normal(size=(256, 8))
y = np.sin(x.sum(axis=1, keepdims=True))
first, second = rng.normal(size=(8, 16)) * 0.3, rng.normal(size=(16, 1)) * 0.3

parameters = [
    gw.Parameter("first.weight", shape=first.shape, layer="first", depth=0, activation="Tanh"),
    gw.Parameter("second.weight", shape=second.shape, layer="second", depth=1),
]
decay = gw.DecayLR(factor=0.3, on=("divergence", "exploding", "oscillation"), cooldown=10)
factor = 1.0
with gw.Watcher(parameters, run_dir="runs/numpy", actions=[decay]) as watcher:
    for _ in range(200):
        hidden = np.tanh(x @ first)
        error = hidden @ second - y
        slope = 2 * error / len(x)
        grad_second, grad_first = hidden.T @ slope, x.T @ (slope @ second.T * (1 - hidden**2))
        rate = 2.0 * factor  # far too high
        norms = [np.linalg.norm(grad_first), np.linalg.norm(grad_second)]
        for due in watcher.observe(grad_norm=norms, loss=np.mean(error**2), lr=rate):
            factor = due.lr_factor
            watcher.applied(due)
        first, second = first - rate * grad_first, second - rate * grad_second

run = gw.load("runs/numpy")
print(run.summary())
print(run.actions()[["step", "action", "reason", "before", "after", "outcome"]])
