"""Does `Rollback` save a run that is driven apart at step 500, and at what cost in accuracy?

    python -m benchmarks.rollback --seeds 0,1,2

The network of `gradwatch demo` on its digits: healthy; and with an accident at step 500, once only watched and once
with `Rollback`. After it the run goes on with the batches that come next, in the same process. Accuracy is of the
thousand digits held back; it must be within one percent of the healthy run's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import gradwatch as gw
from benchmarks.machine import machine
from gradwatch.demo import BATCH, HEALTHY_RATE, TRAINED, build_model, digits

ACCIDENT = 500
RESULTS = Path(__file__).parent / "results" / "rollback.json"
#: Changes model, optimizer or batch at a step; returns the batch.
Accident = Callable[[int, nn.Module, torch.optim.Optimizer, Tensor], Tensor]


def _nothing(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    return x


def _rate(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """A schedule with a slip: ten steps at a hundred times the rate."""
    is_on = ACCIDENT <= step < ACCIDENT + 10
    optimizer.param_groups[0]["lr"] = HEALTHY_RATE * (100.0 if is_on else 1.0)
    return x


def _flip(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """A bit of an exponent turns over in one weight."""
    if step == ACCIDENT:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0].mul_(2.0**32)
    return x


def _batch(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """One picture that is not a number."""
    return x.index_fill(0, torch.tensor([0]), float("nan")) if step == ACCIDENT else x


ACCIDENTS: dict[str, Accident] = {"rate x 100": _rate, "flipped bit": _flip, "NaN batch": _batch}


@dataclass
class Result:
    """How a run ended.

    Args:
        accident: What happened at step 500.
        seed: Of weights and order.
        actions: `Rollback` or none.
        accuracy: Share of the test digits named right.
        difference: From the healthy run's.
        loss: Mean training loss of the last twenty steps.
        done: Steps and details of what was done.
    """

    accident: str
    seed: int
    actions: str
    accuracy: float
    difference: float
    loss: float
    done: list[str]


def trained(accident: Accident, seed: int, steps: int, actions: Any) -> tuple[float, float, list[str]]:
    """Accuracy, final loss, and what was done."""
    torch.set_num_threads(1)
    x, y, x_test, y_test = _tensors(seed)
    torch.manual_seed(seed)
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=HEALTHY_RATE, momentum=0.9)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        with gw.watch(model, optimizer, run_dir=Path(folder) / "run", actions=actions) as watcher:
            for step in range(steps):
                chosen = torch.randint(len(x), (BATCH,))
                batch = accident(step, model, optimizer, x[chosen])
                loss = functional.cross_entropy(model(batch), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                watcher.log(loss=loss)
                losses.append(float(loss.detach()))
        acts = gw.load(Path(folder) / "run").actions()
    done = [f"{a.step}: {a.detail} because of {a.reason} ({a.outcome or 'not judged'})" for a in acts.itertuples()]
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x_test).argmax(1) == y_test).float().mean())
    return accuracy, float(np.mean(losses[-20:])), done


def _tensors(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    images, labels = digits()
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = torch.tensor(images[order])[:, None], torch.tensor(labels[order]).long()
    return x[:TRAINED], y[:TRAINED], x[TRAINED:], y[TRAINED:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 170)
    results: list[Result] = []
    for seed in map(int, options.seeds.split(",")):
        healthy, loss, done = trained(_nothing, seed, options.steps, ())
        results.append(Result("none", seed, "none", healthy, 0.0, loss, done))
        for name, accident in ACCIDENTS.items():
            for actions in ((), (gw.Rollback(every=50),)):
                accuracy, loss, done = trained(accident, seed, options.steps, actions)
                called = "Rollback" if actions else "none"
                results.append(Result(name, seed, called, accuracy, accuracy - healthy, loss, done))
    table = Table("accident", "seed", "actions", "accuracy", "against healthy", "final loss", "done")
    for result in results:
        numbers = (f"{result.accuracy:.1%}", f"{result.difference:+.1%}", f"{result.loss:.3g}")
        table.add_row(result.accident, str(result.seed), result.actions, *numbers, "; ".join(result.done))
    console.print(table)
    saved = {**machine("torch"), "steps": options.steps, "runs": [asdict(result) for result in results]}
    RESULTS.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
