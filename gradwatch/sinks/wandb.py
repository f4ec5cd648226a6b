"""Numbers into Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradwatch.errors import ConfigurationError, MissingDependencyError
from gradwatch.records import ActionRecord, Finding, RunInfo
from gradwatch.sinks.base import Sink
from gradwatch.sinks.rows import METRICS_FAMILY, Row

STEP = "gradwatch/step"


class WandB(Sink):
    """Logs into a run of Weights & Biases, on an axis of its own.

    Names: `gradwatch/loss`, `gradwatch/global_norm`, `gradwatch/grad_norm/LAYER`, ..., all against `gradwatch/step`, so
    that they stand right however often you call `wandb.log` yourself. (Each mirrored step advances the run's own step
    counter, as every call of `wandb.log` does.) Findings: `gradwatch/finding/RULE`, 1 where it opens, 0 where it ends.
    To be alerted by W&B use `gradwatch.alerts.WandBAlert`.

    Args:
        run: A W&B run; by default the one that is active.
        every: Mirror only steps whose number this divides.
        by: `layer` or `parameter`.

    Raises:
        MissingDependencyError: Without the wandb package.
        ConfigurationError: When no run is active, or a setting breaks a rule.
    """

    def __init__(self, run: Any = None, *, every: int = 10, by: str = "layer") -> None:
        super().__init__(every=every, by=by)
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError.of("wandb", extra="wandb") from None
        self._run = run if run is not None else wandb.run
        if self._run is None:
            raise ConfigurationError("no W&B run is active: call wandb.init() first, or pass 'run'")

    def begin(self, info: RunInfo, run_dir: Path) -> None:
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("gradwatch/*", step_metric=STEP)
        self._run.config.update({"gradwatch": {"run_dir": str(run_dir), "host": info.host}}, allow_val_change=True)

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            self._run.log({STEP: row.step, **{_name(*key): value for key, value in row.values.items()}})

    def tell(self, news: Finding | ActionRecord) -> None:
        if isinstance(news, Finding):
            self._run.log({STEP: news.last_step, f"gradwatch/finding/{news.rule}": int(news.is_open)})
        elif not news.outcome:
            self._run.log({STEP: news.step, f"gradwatch/action/{news.action}": 1})

    def end(self, status: str) -> None:
        self._run.summary["gradwatch/status"] = status


def _name(family: str, name: str) -> str:
    return f"gradwatch/{name}" if family == METRICS_FAMILY else f"gradwatch/{family}/{name}"
