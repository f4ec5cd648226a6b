"""What the first rank of a large sharded training does per step, replayed: many parameters, many ranks, no cluster.

    python -m benchmarks.scale                       # 10,000 parameters on 1,024 ranks
    python -m benchmarks.scale --parameters 500 --ranks 16

Every rank contributes sums of squares over its part of each parameter; they are made beforehand, exactly as a rank
makes them. The collective is simulated: the ranks' arrays are added up outside of what is timed, as the network and the
other ranks would. Measured is the processor time of the first rank, of all its threads: packing its own sums, taking
the norms from the total, finding, and writing the record. Time on the wire is not measured; `docs/scaling.md` computes
it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

import gradwatch as gw
from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results" / "scale.json"
#: Bytes of one number of a message, numbers at the head of a message, statistics that are sums.
NUMBER, HEAD, SUMMED = 8, 5, 4


@dataclass(frozen=True)
class Layout:
    """What travels in one exchange of all ranks.

    Args:
        parameters: Tensors of the model.
        every: Steps between two exchanges (`flush_every`).
        stats_every: Steps between samples of the dearer statistics.
        clips: Whether an action in the step needs the global norm.
    """

    parameters: int
    every: int = 50
    stats_every: int = 10
    clips: bool = False

    @property
    def samples(self) -> int:
        """Sampled steps of an exchange."""
        return (self.every - 1) // self.stats_every + 1

    @property
    def numbers(self) -> int:
        """Numbers of an exchange: a sum a parameter and step, one for each statistic, and a maximum."""
        rows = self.every * (1 + self.parameters)
        return HEAD + rows + self.samples * self.parameters * (SUMMED + 1)

    @property
    def bytes_a_step(self) -> float:
        """Bytes that a rank hands to collectives, per step."""
        return NUMBER * (self.numbers / self.every + (self.parameters if self.clips else 0))

    @property
    def collectives_a_step(self) -> float:
        """One an exchange, and one a step where an action needs the norm."""
        return 1 / self.every + self.clips


class Clock:
    """Processor time of this process, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, part: str, function: Callable[[], Any]) -> Any:
        """Call and count."""
        started = time.process_time()
        result = function()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - started
        return result


def described(count: int) -> list[gw.Parameter]:
    """Weights and biases in layers of two."""
    return [
        gw.Parameter(
            f"layer{i // 2}.{'bias' if i % 2 else 'weight'}",
            shape=(64,) if i % 2 else (64, 64),
            layer=f"layer{i // 2}",
            depth=i // 2,
        )
        for i in range(count)
    ]


def local_norms(layout: Layout, ranks: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Norms of the whole and of the first rank's part, shape (every, parameters), and the other ranks' sums of squares.

    Ranks hold unequal parts; each rounds its norms to float32 as it would.
    """
    whole = np.exp(rng.normal(0, 0.2, (layout.every, layout.parameters)))
    first, *rest = np.sqrt(rng.dirichlet(np.ones(ranks)))
    others = np.zeros_like(whole)
    for part in rest:
        others += np.square((whole * part).astype(np.float32).astype(np.float64))
    return whole, (whole * first).astype(np.float32), others


def _packed(norms: Any) -> Any:
    return np.square(norms.astype(np.float64))


def _unpacked(sums: Any) -> Any:
    return np.sqrt(sums).astype(np.float32)


def replay(layout: Layout, ranks: int, exchanges: int) -> tuple[dict[str, float], float]:
    """Processor microseconds per step by part, and the largest relative error of a recorded norm."""
    clock, rng, worst = Clock(), np.random.default_rng(0), 0.0
    with tempfile.TemporaryDirectory() as folder:
        watcher = gw.Watcher(described(layout.parameters), run_dir=Path(folder) / "run", flush_every=layout.every)
        for exchange in range(exchanges):
            whole, mine, others = local_norms(layout, ranks, rng)
            sums = clock.time("pack", partial(_packed, mine))
            total = sums + others  # the collective
            norms = clock.time("unpack", partial(_unpacked, total))
            worst = max(worst, float(np.max(np.abs(norms - whole) / whole)))
            loss = 2.0 / (1 + exchange)

            def take(norms: Any = norms, loss: float = loss) -> None:
                for row in norms:
                    watcher.observe(grad_norm=row, loss=loss)

            clock.time("find and record", take)
        clock.time("find and record", watcher.close)
        assert watcher.faults.messages == {}, watcher.faults.messages
        recorded = gw.load(Path(folder) / "run").grad_norms()
        assert recorded.shape == (exchanges * layout.every, layout.parameters)
    steps = exchanges * layout.every
    return {part: 1e6 * seconds / steps for part, seconds in clock.seconds.items()}, worst


def main() -> None:
    """Replay and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--exchanges", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    parts, worst = replay(Layout(options.parameters), options.ranks, options.exchanges)
    table = Table(title=f"{options.parameters:,} parameters, {options.ranks:,} ranks: the first rank, per step")
    for name in ("what", "without Clip", "with Clip"):
        table.add_column(name, justify="left" if name == "what" else "right")
    layouts = [Layout(options.parameters), Layout(options.parameters, clips=True)]
    for part, microseconds in parts.items():
        table.add_row(f"{part}, µs", *[f"{microseconds:,.0f}"] * 2)
    table.add_row("bytes handed to collectives", *[f"{layout.bytes_a_step:,.0f}" for layout in layouts])
    table.add_row("collectives", *[f"{layout.collectives_a_step:.2f}" for layout in layouts])
    Console().print(table)
    result = {
        "parameters": options.parameters,
        "ranks": options.ranks,
        "steps": options.exchanges * layouts[0].every,
        "microseconds_per_step": parts,
        "largest_relative_error": worst,
        "bytes_per_step": {"plain": layouts[0].bytes_a_step, "clip": layouts[1].bytes_a_step},
        "collectives_per_step": {"plain": layouts[0].collectives_a_step, "clip": layouts[1].collectives_a_step},
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
