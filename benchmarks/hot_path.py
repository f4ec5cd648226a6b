"""What a watched step does beyond an unwatched one, in counts that no load of the machine changes.

    python -m benchmarks.hot_path              # count, print, compare with the baseline
    python -m benchmarks.hot_path --check      # the same; exit 1 when a count rose by more than the tolerance
    python -m benchmarks.hot_path --write      # make these counts the baseline
    python -m benchmarks.hot_path --instructions 10 record    # processor instructions, under valgrind; minutes

Counted on the thread that trains: calls of Python functions, of C functions, and bytecodes. Memory: blocks that the
interpreter holds more after `STEPS` steps than before, a step, and the peak of what a step allocates. Every figure is
the mean over `STEPS` steps, which hold full blocks of steps that are looked at together and all samples of statistics,
minus that of the same loop unwatched. The baseline holds for the versions it names: others count differently.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

import gradwatch as gw
import gradwatch.watcher
from benchmarks.machine import machine

BASELINE = Path(__file__).parent / "results" / "hot-path.json"
#: A multiple of the steps looked at together and of the steps between samples.
STEPS = 120
WARM_UP = 61
#: A count may rise by this share, and by this much besides.
TOLERANCE, SLACK = 0.08, 3.0
#: Blocks of memory that may stay behind a step: rows that wait for the writing thread are some.
BLOCKS = 8.0

Step = Callable[[], None]
Counts = dict[str, float]


def watched(**settings: Any) -> dict[str, Any]:
    """Keyword arguments of `gw.watch`."""
    return settings


VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "record": watched(detectors=[]),
    "record + detect": watched(),
    "record + detect + Clip": watched(actions=[gw.Clip(max_norm=1e9)]),
    "clip_grad_norm_": None,
}


def loop(tensors: int, variant: str, stack: ExitStack) -> Step:
    """A step of a chain of small linear layers with so many tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(tensors // 2)])
    for layer in model:
        nn.init.eye_(layer.weight)  # so that no gradient is too small for float32, which costs a second look
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    inputs = torch.randn(4, 8)
    settings, log = VARIANTS[variant], None
    if settings is not None:
        folder = tempfile.mkdtemp(prefix="hot-path-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        log = stack.enter_context(gw.watch(model, optimizer, run_dir=Path(folder) / "run", **settings)).log

    def step() -> None:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        if variant == "clip_grad_norm_":
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        if log is not None:
            log(loss=loss)

    return step


def _calls(step: Step) -> Counts:
    found = {"python calls": 0, "c calls": 0}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            found["python calls"] += 1
        elif event == "c_call":
            found["c calls"] += 1

    sys.setprofile(note)
    for _ in range(STEPS):
        step()
    sys.setprofile(None)
    return {name: count / STEPS for name, count in found.items()}


def _bytecodes(step: Step) -> Counts:
    found = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal found
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        found += event == "opcode"
        return trace

    sys.settrace(trace)
    for _ in range(STEPS):
        step()
    sys.settrace(None)
    return {"bytecodes": found / STEPS}


def _memory(step: Step) -> Counts:
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(STEPS):
        step()
    gc.collect()
    kept = (sys.getallocatedblocks() - before) / STEPS
    tracemalloc.start()
    peaks = []
    for _ in range(STEPS):
        tracemalloc.reset_peak()
        begun = tracemalloc.get_traced_memory()[0]
        step()
        peaks.append(tracemalloc.get_traced_memory()[1] - begun)
    tracemalloc.stop()
    return {"blocks kept": kept, "peak bytes": sum(peaks) / STEPS}


def count(tensors: int, variant: str) -> Counts:
    """All counts of a step."""
    found: Counts = {}
    for counted in (_calls, _bytecodes, _memory):
        with ExitStack() as stack:
            step = loop(tensors, variant, stack)
            for _ in range(WARM_UP):
                step()
            found |= counted(step)
    return found


def added(tensors: int, variant: str) -> Counts:
    """What the variant adds to the plain loop."""
    plain, other = count(tensors, "plain"), count(tensors, variant)
    return {name: round(other[name] - plain[name], 2) for name in other}


def worse(now: Counts, before: Counts) -> list[str]:
    """The counts that rose beyond the tolerance. The peak depends on when the writing thread runs: it is shown only."""
    found = [
        f"{name}: {now[name]:.1f}, was {before[name]:.1f}"
        for name in ("python calls", "c calls", "bytecodes")
        if now[name] > before[name] * (1 + TOLERANCE) + SLACK
    ]
    if now["blocks kept"] > BLOCKS:
        found.append(f"blocks kept: {now['blocks kept']:.1f}, allowed {BLOCKS}")
    return found


def instructions(tensors: int, variant: str) -> float:
    """Processor instructions of a step, from two runs of different length under valgrind.

    Raises:
        SystemExit: There is no valgrind.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise SystemExit("valgrind is not installed")
    totals = []
    for steps in (WARM_UP, WARM_UP + STEPS):
        run = [valgrind, "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", sys.executable]
        run += ["-m", "benchmarks.hot_path", "--run", str(steps), "--of", str(tensors), variant]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)  # noqa: S603 -- our own
        line = next(line for line in done.stderr.splitlines() if "I refs" in line or "I   refs" in line)
        totals.append(int(line.split()[-1].replace(",", "")))
    return (totals[1] - totals[0]) / STEPS


def _run(tensors: int, variant: str, steps: int) -> None:
    with ExitStack() as stack:
        step = loop(tensors, variant, stack)
        for _ in range(steps):
            step()


def _versions() -> dict[str, str]:
    return {"python": ".".join(map(str, sys.version_info[:2])), "torch": torch.__version__.partition("+")[0]}


def main() -> int:
    """Count, print and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when a count rose beyond the tolerance")
    parser.add_argument("--write", action="store_true", help="make these counts the baseline")
    parser.add_argument("--instructions", nargs=2, metavar=("TENSORS", "VARIANT"), help="under valgrind")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gradwatch.watcher.LATEST = float("inf")  # whole blocks, however slow counting is
    if options.run:
        _run(int(options.of[0]), options.of[1], options.run)
        return 0
    if options.instructions:
        tensors, variant = int(options.instructions[0]), options.instructions[1]
        both = [instructions(tensors, name) for name in ("plain", variant)]
        print(f"{variant}, {tensors} tensors: {both[1]:,.0f} instructions a step, plain {both[0]:,.0f}")
        return 0
    known = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    is_comparable = known.get("versions") == _versions()
    found: dict[str, Counts] = {}
    failures = []
    print(f"{'added to a step by':38}" + "".join(f"{name:>14}" for name in _COLUMNS))
    for tensors in (10, 200):
        for variant in list(VARIANTS)[1:]:
            name = f"{variant}, {tensors} tensors"
            found[name] = added(tensors, variant)
            print(f"{name:38}" + "".join(f"{found[name][column]:>14,.1f}" for column in _COLUMNS), flush=True)
            if is_comparable and variant != "clip_grad_norm_":
                failures += [f"{name}: {what}" for what in worse(found[name], known["counts"][name])]
    if options.write:
        facts = {"machine": machine("torch"), "versions": _versions(), "steps": STEPS, "counts": found}
        BASELINE.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return 0
    if not is_comparable:
        print(f"the baseline is of {known.get('versions')}, this is {_versions()}: not compared")
        return 2 if options.check else 0
    print("\n".join(failures) or "no count rose beyond the tolerance")
    return 1 if options.check and failures else 0


_COLUMNS = ("python calls", "c calls", "bytecodes", "blocks kept", "peak bytes")

if __name__ == "__main__":
    sys.exit(main())
