"""What alerts and sinks cost the training thread: microseconds a step with dead receivers, and a storm of findings.

python -m benchmarks.alerts
"""

from __future__ import annotations

import logging
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from gradwatch import alerts, sinks
from gradwatch.records import Finding, Parameter, RunInfo, StepBatch

STEPS, ROUNDS, STORM = 20_000, 5, 1_000_000
PARAMETERS = tuple(Parameter(f"layers.{i}.weight", depth=i) for i in range(200))
BUDGET = 20.0


def main() -> int:
    """Print the table; 1 when the budget is broken."""
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, Hanging() as hanging:
        channels = dead_channels(hanging.port)
        alone = {f"{channel!r}": median_cost([channel], Path(folder)) for channel in channels}
        together = median_cost(channels, Path(folder))
        for name, cost in alone.items():
            print(f"{name:38} {cost:6.2f} µs a step")
        print(f"{'all of them, every receiver dead':38} {together:6.2f} µs a step (budget {BUDGET:g})")
        for name, sink in mirrors(Path(folder)).items():
            print(f"{name:38} {median_cost([sink], Path(folder)):6.2f} µs a step")
        storm(Path(folder))
    return int(together > BUDGET)


class Hanging:
    """Takes connections and never answers."""

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def dead_channels(port: int) -> list[Any]:
    """One channel of each kind, none of which can deliver."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = probe.getsockname()[1]
    settings: dict[str, Any] = {"group_seconds": 0.0, "cooldown": 0.0, "close_seconds": 0.1, "min_severity": "info"}
    return [
        alerts.Webhook(f"http://127.0.0.1:{port}/", **settings),
        alerts.Webhook(f"http://127.0.0.1:{closed}/", **settings),
        alerts.Apprise(f"json://127.0.0.1:{closed}/?cto=1&rto=1", **settings),
        alerts.Command(["false"], **settings),
        alerts.Call(fail, **settings),
    ]


def fail(_: alerts.Message) -> None:
    """A function that never delivers."""
    raise ConnectionError("dead")


def mirrors(folder: Path) -> dict[str, Any]:
    """The sinks that need no service."""
    return {"TensorBoard": sinks.TensorBoard(folder / "tb", every=10), "Prometheus": sinks.Prometheus(port=0)}


def median_cost(listeners: list[Any], folder: Path) -> float:
    """Median over rounds of microseconds that the calls of one step take; one step in 100 has a finding."""
    for listener in listeners:
        listener.open(RunInfo(PARAMETERS, host="here"), folder / "run")
    batches = [batch_of(step) for step in range(STEPS)]
    rounds = [one_round(listeners, batches, number) for number in range(ROUNDS)]
    for listener in listeners:
        listener.close()
    return statistics.median(rounds)


def one_round(listeners: list[Any], batches: list[StepBatch], number: int) -> float:
    """Mean microseconds a step."""
    calls: list[Callable[[StepBatch], None]] = [listener.steps for listener in listeners]
    spent = 0.0
    for i, batch in enumerate(batches):
        news = finding_of(number * STEPS + i) if i % 100 == 0 else None
        started = time.perf_counter()
        for call in calls:
            call(batch)
        if news is not None:
            for listener in listeners:
                listener.finding(news)
        spent += time.perf_counter() - started
    return spent / len(batches) * 1e6


def batch_of(step: int) -> StepBatch:
    """One step of 200 layers."""
    metrics = {"global_norm": np.array([14.0]), "loss": np.array([1.0]), "time": np.array([1.7e9 + step])}
    return StepBatch(PARAMETERS, np.array([step]), np.ones((1, len(PARAMETERS)), np.float32), metrics)


def finding_of(number: int) -> Finding:
    """A finding that nobody has heard of yet."""
    return Finding(f"spike@{number}", "spike", "critical", number, number, layers=(f"layers.{number % 200}",))


def storm(folder: Path) -> None:
    """A million findings, one after another."""
    got: list[alerts.Message] = []
    channel = alerts.Call(got.append, group_seconds=0.5, cooldown=2.0)
    channel.open(RunInfo(PARAMETERS, host="here"), folder / "run")
    spent = 0.0
    for number in range(STORM):
        news = finding_of(number)
        started = time.perf_counter()
        channel.finding(news)
        spent += time.perf_counter() - started
    channel.close()
    told = sum(group.count for message in got for group in message.groups)
    print(f"storm of {STORM:,} findings: {len(got)} messages that stand for {told:,}, first step told "
          f"{got[0].groups[0].first_step}, {spent / STORM * 1e6:.2f} µs a finding")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
