"""What watching costs on a GPU: a transformer of GPT-2's shape (124M parameters, random weights), step times paired.

    make test-cuda                       # the tests that need a GPU, then this
    python -m benchmarks.gpu --tiny      # a small one, also without a GPU: proves the code, its ratios say little

Variants take turns within a round, in changing order, each with a model of its own; the ratio within the round counts.
A turn is a few steps between two synchronisations, timed by the host. Operations that make the host wait are counted in
a second pass, at their source: what torch dispatches to read a number on the host. On a GPU torch's own sync debug mode
is on in that pass as well, and its warnings are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch as gw
from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results" / "gpu.json"
WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero"}
After = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Shape:
    """The size of the model and of a batch."""

    layers: int
    width: int
    heads: int
    words: int
    length: int
    batch: int


GPT2 = Shape(layers=12, width=768, heads=12, words=50257, length=1024, batch=8)
TINY = Shape(layers=2, width=64, heads=2, words=257, length=32, batch=2)


def model_of(shape: Shape, device: str) -> nn.Module:
    """GPT-2 from its configuration alone; nothing is downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=shape.words, n_positions=shape.length,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(config).to(device)
    return model


def norms_one_by_one(model: nn.Module) -> None:
    """The loop that people write: a wait for every parameter."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.norm().item()


def clip(model: nn.Module) -> None:
    """Torch's own clipping."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


#: Variant to what it does between backward and step, and gradwatch's settings; None leaves gradwatch out.
VARIANTS: dict[str, tuple[After | None, dict[str, Any] | None]] = {
    "plain": (None, None),
    "plain again": (None, None),
    "item loop": (norms_one_by_one, None),
    "clip_grad_norm_": (clip, None),
    "gradwatch": (None, {}),
    "gradwatch with Clip": (None, {"actions": [gw.Clip(max_norm=1.0)]}),
    "gradwatch with SkipStep, Clip": (None, {"actions": [gw.SkipStep(), gw.Clip(max_norm=1.0)]}),
}


class Training:
    """One variant, ready to step."""

    def __init__(self, variant: str, shape: Shape, device: str, run_dir: Path) -> None:
        self._after, settings = VARIANTS[variant]
        self._model, self._device = model_of(shape, device), device
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        words = torch.randint(shape.words, (shape.batch, shape.length), generator=torch.Generator().manual_seed(1))
        self._words = words.to(device)
        self._watcher: Any = None
        if settings is not None:
            self._watcher = gw.watch(self._model, self._optimizer, run_dir=run_dir / variant, **settings)

    def step(self) -> None:
        """One step of training, in bfloat16 on a GPU."""
        self._optimizer.zero_grad()
        with torch.autocast(self._device, torch.bfloat16, enabled=self._device == "cuda"):
            loss: Tensor = self._model(input_ids=self._words, labels=self._words).loss
        loss.backward()
        if self._after is not None:
            self._after(self._model)
        self._optimizer.step()
        if self._watcher is not None:
            self._watcher.log(loss=loss)

    def seconds(self, steps: int) -> float:
        """Wall time of so many steps, until the device is done."""
        _finish(self._device)
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        _finish(self._device)
        return time.perf_counter() - started

    def close(self) -> dict[str, str]:
        """End the record; gradwatch's own failures, by part."""
        if self._watcher is None:
            return {}
        self._watcher.close()
        return dict(self._watcher.faults.messages)


class Waits(TorchDispatchMode):
    """Counts operations that read a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().partition(".")[0] in WAITS
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _posing_as_device(device: str) -> Iterator[None]:
    """Without a GPU, send CPU tensors the way of a device's, so that the same code runs."""
    from gradwatch.backends import torch_device

    kept = torch_device.HOST
    if device != "cuda":
        torch_device.HOST = ()
    try:
        yield
    finally:
        torch_device.HOST = kept


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _waits(training: Training, device: str, steps: int) -> dict[str, float]:
    with Waits() as waits, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            training.step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    told = sum("called a synchronizing" in str(warning.message) for warning in seen)
    return {"reads": waits.count / steps, "warnings": told / steps}


def measure(shape: Shape, device: str, *, rounds: int, steps: int, counted: int) -> dict[str, Any]:
    """Ratios of step times to the plain loop, and waits per step, by variant."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, _posing_as_device(device):
        trainings = {variant: Training(variant, shape, device, Path(folder)) for variant in VARIANTS}
        for training in trainings.values():
            training.seconds(12)  # first plans, allocations, and one sampled step
        ratios: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        plain = []
        gc.disable()
        for turn in range(rounds):
            order = list(VARIANTS)[turn % len(VARIANTS) :] + list(VARIANTS)[: turn % len(VARIANTS)]
            took = {variant: trainings[variant].seconds(steps) for variant in order}
            plain.append(took["plain"] / steps)
            for variant in VARIANTS:
                ratios[variant].append(took[variant] / took["plain"])
            gc.collect()
        gc.enable()
        for variant, training in trainings.items():
            quarters = statistics.quantiles(ratios[variant], n=4)
            row = {"ratio": statistics.median(ratios[variant]), "quartiles": [quarters[0], quarters[2]]}
            rows[variant] = row | _waits(training, device, counted) | {"failures": training.close()}
    return {"step_seconds": statistics.median(plain), "variants": rows}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{result['device']}: plain step {1000 * result['step_seconds']:.2f} ms")
    for name in ("variant", "step time", "quartiles", "reads / step", "sync warnings / step"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for variant, row in result["variants"].items():
        low, high = row["quartiles"]
        table.add_row(
            variant, f"{row['ratio']:.4f} x", f"{low:.4f} - {high:.4f}", f"{row['reads']:g}", f"{row['warnings']:g}"
        )
    Console().print(table)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU where there is no GPU")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn: one of ten is sampled")
    parser.add_argument("--output", type=Path, help="default: results/gpu.json, with --tiny nowhere")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("there is no CUDA device: use --tiny to try the code")
    shape = TINY if options.tiny else GPT2
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU tensors posing as a device's"
    counted = 10
    result = {
        "device": name,
        "shape": vars(shape),
        "rounds": options.rounds,
        "steps": options.steps,
        **measure(shape, device, rounds=options.rounds, steps=options.steps, counted=counted),
        "machine": machine("torch", "transformers"),
    }
    show(result)
    output = options.output or (None if options.tiny else RESULTS)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
