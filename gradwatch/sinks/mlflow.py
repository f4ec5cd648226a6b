"""Numbers into MLflow."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

from gradwatch.errors import ConfigurationError, MissingDependencyError
from gradwatch.records import ActionRecord, Finding, RunInfo
from gradwatch.sinks.base import Sink
from gradwatch.sinks.rows import METRICS_FAMILY, Row

#: Metrics that MLflow takes in one call.
_BATCH = 1000
#: What MLflow does not allow in a name.
_FORBIDDEN = re.compile(r"[^\w\-. :/]")


class MLflow(Sink):
    """Logs metrics into a run of MLflow; findings and actions become a JSON artifact, `gradwatch/events.json`.

    Names: `gradwatch/loss`, `gradwatch/grad_norm/LAYER`, ...; characters that MLflow does not allow become `_`.

    Args:
        run_id: An MLflow run; by default the one that is active.
        tracking_uri: Where it lives; by default what MLflow is set to.
        every: Mirror only steps whose number this divides.
        by: `layer` or `parameter`.

    Raises:
        MissingDependencyError: Without the mlflow package.
        ConfigurationError: When no run is active, or a setting breaks a rule.
    """

    def __init__(
        self, run_id: str | None = None, *, tracking_uri: str | None = None, every: int = 10, by: str = "layer"
    ) -> None:
        super().__init__(every=every, by=by)
        try:
            import mlflow
            from mlflow.entities import Metric
        except ImportError:
            raise MissingDependencyError.of("mlflow", extra="mlflow") from None
        active = mlflow.active_run()
        if run_id is None and active is None:
            raise ConfigurationError("no MLflow run is active: call mlflow.start_run() first, or pass 'run_id'")
        self._run_id = run_id if run_id is not None else active.info.run_id
        self._client: Any = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._metric: Any = Metric
        self._events: list[dict[str, Any]] = []

    def begin(self, info: RunInfo, run_dir: Path) -> None:
        self._client.set_tag(self._run_id, "gradwatch.run_dir", str(run_dir))
        self._client.set_tag(self._run_id, "gradwatch.host", info.host)

    def write(self, rows: list[Row]) -> None:
        metrics = (
            self._metric(_name(*key), value, int(row.time * 1000), row.step)
            for row in rows
            for key, value in row.values.items()
        )
        while batch := list(islice(metrics, _BATCH)):
            self._client.log_batch(self._run_id, metrics=batch)

    def tell(self, news: Finding | ActionRecord) -> None:
        kind = "finding" if isinstance(news, Finding) else "action"
        self._events = [event for event in self._events if event["id"] != news.id][-10_000:]
        self._events.append({"kind": kind, **news.to_json()})

    def end(self, status: str) -> None:
        self._client.set_tag(self._run_id, "gradwatch.status", status)
        self._client.log_dict(self._run_id, {"events": self._events}, "gradwatch/events.json")


def _name(family: str, name: str) -> str:
    return _FORBIDDEN.sub("_", f"gradwatch/{name}" if family == METRICS_FAMILY else f"gradwatch/{family}/{name}")
