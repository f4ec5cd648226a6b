"""What watching costs: step times of the same training with and without, paired and interleaved.

Every variant trains its own copy of a model. In each round all variants run a few steps in changing order, and the
ratio to the unwatched copy of the same round counts; so load and clock of the machine cancel. Two clocks are read: wall
time, and processor time of the whole process, which also holds the work of background threads and does not see other
processes. The table has medians over rounds with 95 % bootstrap intervals.

    python benchmarks/overhead.py --models mlp transformer --rounds 40
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead_models import CASES, Case
from torch import nn

import gradwatch as gw

Step = Callable[[], None]
#: Larger than any norm: clipping is computed and multiplies by one, as in most steps of a healthy run.
LIMIT = 1e9


@dataclass
class Training:
    """One copy of a model with its optimizer and batch."""

    case: Case
    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, case: Case) -> Training:
        """The same for every variant."""
        torch.manual_seed(0)
        model = case.build()
        inputs, targets = case.batch()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(case, model, torch.optim.AdamW(trained, lr=1e-5), inputs, targets)

    def backward(self) -> torch.Tensor:
        """The loss, its gradients in place."""
        self.optimizer.zero_grad()
        loss = self.case.loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss


def plain(training: Training, stack: ExitStack) -> Step:
    """The loop without anything."""

    def step() -> None:
        training.backward()
        training.optimizer.step()

    return step


def foreach(training: Training, stack: ExitStack) -> Step:
    """The least that per-parameter norms can cost with torch alone: kept in a list of tensors, never looked at."""
    parameters = [p for p in training.model.parameters() if p.requires_grad]
    kept: list[torch.Tensor] = []

    def step() -> None:
        training.backward()
        kept.append(torch.stack(torch._foreach_norm([p.grad for p in parameters])))  # noqa: SLF001 -- torch has no public name
        training.optimizer.step()

    return step


def items(training: Training, stack: ExitStack) -> Step:
    """The loop that people write: `.item()` per parameter."""
    kept: list[dict[str, float]] = []

    def step() -> None:
        training.backward()
        named = training.model.named_parameters()
        kept.append({name: p.grad.norm().item() for name, p in named if p.grad is not None})
        training.optimizer.step()

    return step


def clip(training: Training, stack: ExitStack) -> Step:
    """`clip_grad_norm_`, which knows one norm only."""

    def step() -> None:
        training.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), LIMIT)
        training.optimizer.step()

    return step


def watched(**settings: Any) -> Callable[[Training, ExitStack], Step]:
    """A variant under gradwatch."""

    def variant(training: Training, stack: ExitStack) -> Step:
        folder = tempfile.mkdtemp(prefix="overhead-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        watcher = stack.enter_context(
            gw.watch(training.model, training.optimizer, run_dir=Path(folder) / "run", **settings)
        )

        def step() -> None:
            loss = training.backward()
            training.optimizer.step()
            watcher.log(loss=loss)

        return step

    return variant


VARIANTS: dict[str, Callable[[Training, ExitStack], Step]] = {
    "plain": plain,
    "plain again": plain,
    "foreach norms": foreach,
    "item loop": items,
    "clip_grad_norm_": clip,
    "gradwatch, record": watched(detectors=[]),
    "gradwatch, record + detect": watched(),
    "gradwatch, record + detect + Clip": watched(actions=[gw.Clip(max_norm=LIMIT)]),
    "gradwatch, all statistics every step": watched(stats_every=1),
}


@dataclass
class Measured:
    """Seconds per step of one variant, one entry a round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def measure(case: Case, names: list[str], *, rounds: int, seconds: float) -> dict[str, Measured]:
    """Run the variants round by round.

    Args:
        case: The model.
        names: Of `VARIANTS`; the first is what the others are divided by.
        rounds: How often each variant gets its turn.
        seconds: How long a turn lasts, about.
    """
    found = {name: Measured() for name in names}
    with ExitStack() as stack:
        steps = {name: VARIANTS[name](Training.of(case), stack) for name in names}
        for step in steps.values():
            for _ in range(5):
                step()
        started = time.perf_counter()
        for _ in range(3):
            steps[names[0]]()
        count = max(1, round(seconds / ((time.perf_counter() - started) / 3)))
        order = np.random.default_rng(0)
        for _ in range(rounds):
            gc.collect()
            for name in order.permutation(names):
                wall, processor = time.perf_counter(), time.process_time()
                for _ in range(count):
                    steps[name]()
                found[name].processor.append((time.process_time() - processor) / count)
                found[name].wall.append((time.perf_counter() - wall) / count)
    return found


def summarized(found: dict[str, Measured], *, base: str = "plain") -> dict[str, dict[str, float]]:
    """Median step time and ratios to the base, with 95 % intervals of the median by bootstrap over rounds."""
    table = {}
    for name, measured in found.items():
        row = {"step_ms": 1e3 * float(np.median(measured.wall))}
        for clock in ("wall", "processor"):
            ratios = np.array(getattr(measured, clock)) / np.array(getattr(found[base], clock))
            low, high = _interval(ratios)
            row |= {clock: float(np.median(ratios)), f"{clock}_low": low, f"{clock}_high": high}
        table[name] = row
    return table


def _interval(ratios: np.ndarray[Any, Any]) -> tuple[float, float]:
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gradwatch": gw.__version__,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def show(model: str, table: dict[str, dict[str, float]]) -> None:
    """Print one model's rows."""
    print(f"\n{model:38s} {'step':>9s}   {'wall':>22s}   {'processor':>22s}")
    for name, row in table.items():
        cells = [f"{row[c]:.3f} [{row[c + '_low']:.3f}, {row[c + '_high']:.3f}]" for c in ("wall", "processor")]
        print(f"{name:38s} {row['step_ms']:6.2f} ms   {cells[0]:>22s}   {cells[1]:>22s}", flush=True)


def main() -> None:
    """Measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = ["plain", *[name for name in given.variants if name != "plain"]]
    results: dict[str, Any] = {"machine": machine(), "models": {}}
    for model in given.models:
        found = measure(CASES[model], names, rounds=given.rounds, seconds=given.seconds)
        table = summarized(found)
        show(model, table)
        results["models"][model] = {"summary": table, "rounds": {name: asdict(m) for name, m in found.items()}}
    results["machine"]["peak_rss_mb"] = machine()["peak_rss_mb"]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
