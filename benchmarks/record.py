"""What recording costs, how large a run gets, how fast it opens. Prints tables, writes JSON.

python -m benchmarks.record cost
python -m benchmarks.record size --steps 1000000 --parameters 300
python -m benchmarks.record soak --steps 200000 [--plain]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from gradwatch.records import METRICS, Parameter, RunInfo, StepBatch
from gradwatch.storage import store
from gradwatch.writer import RunWriter

_READ = """
import sys, time, json, resource
import gradwatch as gw
from gradwatch.run import Run
def timed(work):
    begin = time.perf_counter(); work(); return round(time.perf_counter() - begin, 3)
found = {}
path = sys.argv[1]
found["load, first in the process (imports pyarrow)"] = timed(lambda: gw.load(path))
found["load"] = timed(lambda: gw.load(path))
run = gw.load(path)
found["summary"] = timed(run.summary)
found["heatmap"] = timed(run.plot.heatmap)
found["report"] = timed(lambda: run.report(sys.argv[2]))
found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(json.dumps(found))
"""


def rss() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cost(steps: int, parameters: int, step_ms: float) -> dict[str, Any]:
    """Time in `write` per step, on a training thread that works in native code between steps.

    The same loop without the writer, interleaved in blocks, gives the noise of the machine.
    """
    columns = tuple(Parameter(f"layers.{i}.weight", depth=i) for i in range(parameters))
    rng = np.random.default_rng(0)
    norms = rng.lognormal(size=(200, 1, parameters)).astype(np.float32)
    matrix = rng.random((96, 96))
    taken, sealing, idle = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        before = rss()
        writer = RunWriter(Path(folder) / "run", RunInfo(columns))
        for step in range(steps):
            end = time.perf_counter() + step_ms / 1000
            while time.perf_counter() < end:
                matrix @ matrix
            metrics = {name: np.array([0.5]) for name in METRICS}
            batch = StepBatch(columns, np.array([step]), norms[step % 200].copy(), metrics)
            recorder = writer._recorder  # noqa: SLF001 -- whether it seals right now
            is_sealing = recorder is not None and recorder.store.has_ended
            begin = time.perf_counter()
            writer.write(batch)
            spent = time.perf_counter() - begin
            taken.append(spent)
            if is_sealing:
                sealing.append(spent)
            begin = time.perf_counter()
            batch.metric("loss")
            idle.append(time.perf_counter() - begin)
        added = rss() - before
        writer.close()

    def table(times: list[float]) -> dict[str, float]:
        micro = np.array(times) * 1e6
        percentiles = dict(zip(("median", "p99", "p99.9"), np.percentile(micro, [50, 99, 99.9]), strict=True))
        return {
            "mean": float(micro.mean()),
            **{k: float(v) for k, v in percentiles.items()},
            "worst": float(micro.max()),
        }

    return {
        "steps": steps,
        "parameters": parameters,
        "microseconds, all steps": table(taken),
        "steps while sealing": len(sealing),
        "microseconds, while sealing": table(sealing or [0.0]),
        "microseconds, an empty call in the same loop": table(idle),
        "resident MB added": round(added, 1),
        "dropped": writer.dropped_steps,
    }


def size(steps: int, parameters: int) -> dict[str, Any]:
    """Bytes and memory of a synthetic run, and how fast it opens."""
    from gradwatch.testing import write_run

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        begin, samples = time.perf_counter(), [rss()]
        stop = threading.Event()
        watcher = threading.Thread(target=_sample, args=(samples, stop))
        watcher.start()
        write_run(run, steps=steps, parameters=parameters)
        stop.set()
        watcher.join()
        seconds = time.perf_counter() - begin
        total = {name: _bytes(run / name) for name in ("steps", "samples", "rollups", "")}
        code = [sys.executable, "-c", _READ, str(run), f"{folder}/report.html"]
        read = json.loads(subprocess.run(code, check=True, capture_output=True, text=True).stdout)  # noqa: S603
    half = len(samples) // 2
    return {
        "steps": steps,
        "parameters": parameters,
        "seconds to write": round(seconds, 1),
        "bytes a value": {name or "all": round(n / steps / parameters, 3) for name, n in total.items()},
        "resident MB: second quarter, last quarter": [
            round(float(np.mean(samples[half // 2 : half])), 1),
            round(float(np.mean(samples[-half // 2 :])), 1),
        ],
        "seconds": read,
    }


def _sample(samples: list[float], stop: threading.Event) -> None:
    while not stop.wait(0.2):
        samples.append(rss())


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def soak(steps: int, *, is_watched: bool) -> dict[str, Any]:
    """A small real training with all on, warmed up until a few segments are sealed: slopes of memory, threads, handles.

    The first seals load code and fill the pools of the allocators once; what grows with the steps shows afterwards.
    The points lie in memory of their own from the start, or they would be the growth that they measure.

    Args:
        steps: After those of the warm-up.
        is_watched: Else the plain loop, for comparison.
    """
    import torch

    import gradwatch as gw

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    store.SEAL_ROWS, warm_up = max(100, steps // 20), steps // 2
    names, every = ("step", *_memory()), steps // 200
    points = np.full((len(names), (warm_up + steps - 1) // every + 1), -1.0)
    with tempfile.TemporaryDirectory() as folder:
        watcher = (
            gw.watch(
                model,
                optimizer,
                run_dir=f"{folder}/run",
                activations=True,
                actions=[gw.Clip(max_norm=1.0), gw.SkipStep(), gw.DecayLR(factor=0.5, on="exploding")],
                alerts=[gw.alerts.Log()],
                sinks=[gw.sinks.TensorBoard(f"{folder}/tb")],
            )
            if is_watched
            else None
        )
        begin = time.perf_counter()
        for step in range(warm_up + steps):
            x = torch.randn(8, 16)
            optimizer.zero_grad()
            loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss.backward()
            optimizer.step()
            if watcher:
                watcher.log(loss=loss)
            if step % every == 0:
                points[:, step // every] = step, *_memory().values()
        seconds = time.perf_counter() - begin
        if watcher:
            watcher.close()
    later = dict(zip(names, points[:, points[0] >= warm_up], strict=True))
    thousands = later.pop("step") / 1000
    slopes = {name: round(float(np.polyfit(thousands, later[name], 1)[0]), 3) for name in later if name.endswith("kB")}
    return {
        "steps": steps,
        "steps of warm-up": warm_up,
        "seconds": round(seconds, 1),
        "kB per 1000 steps": slopes,
        "resident MB, every twentieth": [round(kb / 1000, 2) for kb in points[1, ::20]],
        "threads": sorted({int(n) for n in later["threads"]}),
        "handles": sorted({int(n) for n in later["handles"]}),
    }


class _Heap(ctypes.Structure):
    """What `mallinfo2` of the C library returns."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def _memory() -> dict[str, float]:
    """Memory of this process by who holds it; threads and handles."""
    import pyarrow as pa

    asked = ctypes.CDLL(None).mallinfo2
    asked.restype = _Heap
    heap = asked()
    return {
        "resident kB": rss() * 1000,
        "heap in use kB": (heap.uordblks + heap.hblkhd) / 1000,
        "heap free kB": heap.fordblks / 1000,
        "arrow kB": pa.total_allocated_bytes() / 1000,
        "threads": threading.active_count(),
        "handles": len(list(Path("/proc/self/fd").iterdir())),
    }


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cost", "size", "soak"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--parameters", type=int)
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--plain", action="store_true", help="soak the same loop without gradwatch")
    options = parser.parse_args()
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "cost": lambda: cost(options.steps or 20_000, options.parameters or 1000, options.step_ms),
        "size": lambda: size(options.steps or 1_000_000, options.parameters or 300),
        "soak": lambda: soak(options.steps or 200_000, is_watched=not options.plain),
    }
    result = {**machine(), "command": " ".join(sys.argv[1:]), "load": os.getloadavg(), **work[options.what]()}
    name = f"record-{options.what}" + (f"-{options.parameters}" if options.parameters else "-plain" * options.plain)
    Path(f"benchmarks/results/{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
