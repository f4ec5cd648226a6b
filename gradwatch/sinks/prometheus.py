"""Numbers for a Prometheus server to fetch."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gradwatch.errors import ConfigurationError, MissingDependencyError
from gradwatch.records import NOT_MEASURED, ActionRecord, Finding, Layers, RunInfo, StepBatch

#: Alert rules and a Grafana dashboard, to be copied or loaded from here.
RULES_FILE = Path(__file__).with_name("prometheus_rules.yml")
DASHBOARD_FILE = Path(__file__).with_name("grafana_dashboard.json")
#: Pairs of rule and severity, or actions, that are told apart; open findings that are followed.
_MOST_LABELS, _MOST_OPEN = 200, 10_000
_GAUGES = {
    "global_norm": ("gradwatch_gradient_norm", "Global gradient norm of the last step."),
    "loss": ("gradwatch_loss", "Loss of the last step."),
    "lr": ("gradwatch_learning_rate", "Learning rate of the last step."),
    "lr_factor": ("gradwatch_learning_rate_factor", "What gradwatch multiplies the learning rate by."),
    "clip_coefficient": ("gradwatch_clip_coefficient", "What gradients were multiplied by in the last step."),
}


class Prometheus:
    """Serves `/metrics`. Nothing is computed until a server asks: a step costs the training one assignment.

    The number of series is bounded: at most `max_layers` layers, evenly chosen over the depth of the network.

    Args:
        port: Where to listen; 0 takes any free port, `port` then says which.
        host: Address to listen on; "0.0.0.0" for all. There is no password: whoever can connect can read.
        max_layers: Layers that have a series of their own.

    Attributes:
        port: Where it listens.

    Raises:
        MissingDependencyError: Without the prometheus-client package.
        ConfigurationError: When a setting breaks a rule.
    """

    def __init__(self, port: int = 9464, *, host: str = "127.0.0.1", max_layers: int = 50) -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ConfigurationError.of("port", "an integer from 0 to 65535", port)
        if isinstance(max_layers, bool) or not isinstance(max_layers, int) or max_layers < 0:
            raise ConfigurationError.of("max_layers", "an integer >= 0", max_layers)
        try:
            import prometheus_client.core
        except ImportError:
            raise MissingDependencyError.of("prometheus-client", extra="prometheus") from None
        self._client: Any = prometheus_client
        self.port, self._host, self._max_layers = port, host, max_layers
        self._server: Any = None
        self._forget()

    def _forget(self) -> None:
        self._latest: StepBatch | None = None
        self._steps = self._skipped = 0
        self._step_times: deque[float] = deque(maxlen=100)
        self._open: dict[str, tuple[str, ...]] = {}
        self._seen: set[str] = set()
        self._findings: Counter[tuple[str, ...]] = Counter()
        self._actions: Counter[tuple[str, ...]] = Counter()
        self._run: dict[str, str] = {}

    def open(
        self,
        info: RunInfo,
        run_dir: Path,
        *,
        first_step: int = 0,
        note: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        """A run begins: start to serve.

        Raises:
            ConfigurationError: When it serves another run.
            OSError: When the port is taken.
        """
        if self._server is not None:
            raise ConfigurationError(f"{self!r} serves another run: give each run a sink of its own")
        self._forget()
        self._run = {
            "run": Path(run_dir).resolve().name,
            "host": info.host,
            "framework": info.framework,
            "rank": str(info.rank),
            "version": str(info.versions.get("gradwatch", "")),
        }
        registry = self._client.CollectorRegistry(auto_describe=False)
        registry.register(self)
        self._server, self._thread = self._client.start_http_server(self.port, addr=self._host, registry=registry)
        self.port = self._server.server_port

    def steps(self, batch: StepBatch) -> None:
        """Steps have ended."""
        self._latest = batch
        self._steps += len(batch.step)
        if (skipped := batch.metrics.get("skipped")) is not None and skipped[-1]:
            self._skipped += int((skipped > 0).sum())
        if (took := batch.metrics.get("step_time")) is not None:
            self._step_times.append(took[-1])

    def finding(self, finding: Finding) -> None:
        """A finding opened, changed or resolved."""
        before = self._open.get(finding.id)
        if before is None and finding.id not in self._seen and len(self._seen) < _MOST_OPEN:
            self._seen.add(finding.id)
            self._count(self._findings, (finding.rule, finding.severity))
        if finding.is_open and (before is not None or len(self._open) < _MOST_OPEN):
            self._open[finding.id] = (finding.rule, finding.severity)
        elif not finding.is_open:
            self._open.pop(finding.id, None)

    def action(self, record: ActionRecord) -> None:
        """An action was applied, or its outcome is known."""
        if not record.outcome and not record.dry_run:
            self._count(self._actions, (record.action,))

    def close(self, status: str = "finished", detail: str = "") -> None:
        """The run ends: stop to serve."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def collect(self) -> Iterator[Any]:
        """What the client library asks for at each scrape."""
        core = self._client.core
        info = core.InfoMetricFamily("gradwatch_run", "The run.", value=self._run)
        yield info
        yield core.CounterMetricFamily("gradwatch_steps", "Optimizer steps seen.", value=self._steps)
        yield core.CounterMetricFamily("gradwatch_skipped_steps", "Steps that were skipped.", value=self._skipped)
        yield from self._counts(core)
        if self._latest is not None:
            yield from self._last_step(core, self._latest)

    def _last_step(self, core: Any, batch: StepBatch) -> Iterator[Any]:
        yield core.GaugeMetricFamily("gradwatch_step", "Number of the last step.", value=int(batch.step[-1]))
        times = [seconds for seconds in list(self._step_times) if seconds > 0]
        if times:
            words = "Median time of the last steps."
            yield core.GaugeMetricFamily("gradwatch_step_seconds", words, value=statistics.median(times))
        ended = float(batch.metric("time")[-1])
        words = "When the last step ended."
        ended = ended if math.isfinite(ended) else time.time()
        yield core.GaugeMetricFamily("gradwatch_last_step_timestamp_seconds", words, value=ended)
        for metric, (name, words) in _GAUGES.items():
            if (value := float(batch.metric(metric)[-1])) != NOT_MEASURED:
                yield core.GaugeMetricFamily(name, words, value=value)
        layers = core.GaugeMetricFamily("gradwatch_layer_gradient_norm", "Gradient norm per layer.", labels=["layer"])
        for name, norm in self._layer_norms(batch):
            layers.add_metric([name], norm)
        yield layers

    def _layer_norms(self, batch: StepBatch) -> Iterator[tuple[str, float]]:
        layers = Layers(batch.parameters)
        norms = layers.norms(batch.grad_norm[-1:])[0].tolist()
        count = min(self._max_layers, len(layers))
        for i in range(count):
            place = round(i * (len(layers) - 1) / max(count - 1, 1))
            if norms[place] != NOT_MEASURED:
                yield layers.names[place], norms[place]

    def _counts(self, core: Any) -> Iterator[Any]:
        labels = ["rule", "severity"]
        total = core.CounterMetricFamily("gradwatch_findings", "Findings that opened.", labels=labels)
        opened = core.GaugeMetricFamily("gradwatch_findings_open", "Findings that hold now.", labels=labels)
        holding = Counter(dict(self._open).values())
        for kind in list(self._findings):
            total.add_metric(kind, self._findings[kind])
            opened.add_metric(kind, holding[kind])
        actions = core.CounterMetricFamily("gradwatch_actions", "Actions that were applied.", labels=["action"])
        for kind, number in dict(self._actions).items():
            actions.add_metric(kind, number)
        yield from (total, opened, actions)

    @staticmethod
    def _count(counter: Counter[tuple[str, ...]], kind: tuple[str, ...]) -> None:
        if kind in counter or len(counter) < _MOST_LABELS:
            counter[kind] += 1

    def __repr__(self) -> str:
        return f"Prometheus({self._host}:{self.port})"
