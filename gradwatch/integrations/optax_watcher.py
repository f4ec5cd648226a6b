"""The watcher of an optax loop: takes the rows that leave the compiled step, in the thread that JAX calls us in."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import jax
import numpy as np

from gradwatch.actions.base import Due
from gradwatch.actions.renewal import Stop
from gradwatch.errors import StopTraining
from gradwatch.provenance import _versions as versions_of
from gradwatch.records import NOT_MEASURED, Finding, Floats, Parameter, RunInfo
from gradwatch.rows import number
from gradwatch.settings import Options
from gradwatch.watcher import Watcher


@dataclass
class _Row:
    count: int
    norms: Floats
    metrics: dict[str, float]
    statistics: dict[str, Floats]
    skip_reason: int


class OptaxWatcher(Watcher):
    """Watches an optax optimizer; made by `gradwatch.integrations.optax.watch`.

    The newest row stays open until the next one comes, so that what is logged behind an update belongs to it.

    Args:
        parameters: What is measured.
        settings: Keyword arguments of `gradwatch.settings.Settings`.
    """

    def __init__(self, parameters: list[Parameter], **settings: Unpack[Options]) -> None:
        super().__init__(parameters, framework="jax", **settings)
        self._lock = threading.RLock()
        self._open_row: _Row | None = None
        self._first = 0
        #: Why the training is to stop; None while it is not.
        self.stops: str | None = None
        self.on_stop = self._stop

    @property
    def findings(self) -> list[Finding]:
        """See `Watcher.findings`; waits for the last step."""
        jax.effects_barrier()
        with self._lock:
            return super().findings

    def took(self, count: int, norms: Any, numbers: Mapping[str, Any], statistics: Any) -> Any:
        """An update was made.

        Args:
            count: Updates before it, as the optimizer's state counts; the same again replaces the last.
            norms: Shape (p,).
            numbers: `reason`, an index into SKIP_REASONS, and metrics.
            statistics: Norms of weights and ratios of updates to them before that factor, shape (2, p); `NOT_MEASURED`
                throughout when not sampled.

        Returns:
            gradwatch's factor on the learning rate, a float32 scalar.
        """
        with self._lock:
            if self._closed:
                return np.float32(1.0)
            started = time.perf_counter()
            self.faults.call("optax", self._take, count, norms, numbers, statistics, default=None)
            self._hook_seconds += time.perf_counter() - started
            return np.float32(self._policy.state.lr_factor)

    def _take(self, count: int, norms: Any, numbers: Mapping[str, Any], statistics: Any) -> None:
        if self._open_row is not None and count != self._open_row.count:
            self._settle()
        if self._first + count < self._next_step:
            self._first = self._next_step - count  # the loop began again, or goes on with an older record
        metrics = {name: float(value) for name, value in numbers.items()}
        metrics["time"] = time.time()
        skip_reason = int(metrics.pop("reason"))
        if self.settings.dry_run:
            metrics["would_skip"], metrics["would_clip"] = float(skip_reason > 0), metrics.pop("clip_coefficient")
            skip_reason = 0
        sampled = np.asarray(statistics)
        known = {}
        if np.any(sampled != NOT_MEASURED):
            weight_norm, update_ratio = sampled
            known = {
                "weight_norm": weight_norm,
                "update_ratio": update_ratio * np.float32(self._policy.state.lr_factor),
            }
        self._open_row = _Row(count, np.asarray(norms), metrics, known, skip_reason)

    def _settle(self) -> None:
        """Close the open row."""
        row, self._open_row = self._open_row, None
        if row is None:
            return
        self._next_step = self._first + row.count
        due = self._close_row(row.norms, row.metrics, statistics=row.statistics, skip_reason=row.skip_reason)
        if due is not None:
            self._act(due)

    def _act(self, due: Due) -> None:
        self.monitor.acted(due, self._next_step)
        if isinstance(due.action, Stop) and not self.settings.dry_run:
            self.on_stop(due.detail)

    def _stop(self, words: str) -> None:
        self.stops = words

    def log(self, **numbers: Any) -> None:
        """Add numbers to the record of the newest step, and wait for it.

        Raises:
            StopTraining: A `Stop` is due.
        """
        super().log(**numbers)
        if self.stops is not None:
            raise StopTraining(self.stops)

    def _log(self, numbers: Mapping[str, Any]) -> None:
        known = {name: number(name, value) for name, value in numbers.items()}
        jax.effects_barrier()
        with self._lock:
            if self._open_row is None:
                super()._log(known)
            else:
                self._open_row.metrics.update(known)

    def mark(self, text: str) -> None:
        """See `Watcher.mark`."""
        jax.effects_barrier()
        with self._lock:
            super().mark(text)

    def state_dict(self) -> dict[str, Any]:
        """See `Watcher.state_dict`; the step in progress is complete with it."""
        jax.effects_barrier()
        with self._lock:
            self._settle()
            return super().state_dict()

    def close(self, status: str = "finished", detail: str = "") -> None:
        """See `Watcher.close`; waits for the last step."""
        if self._closed:
            return
        self.faults.call("optax", jax.effects_barrier, default=None)
        with self._lock:
            self.faults.call("optax", self._settle, default=None)
            super().close(status, detail)

    def _info(self) -> RunInfo:
        info = super()._info()
        return dataclasses.replace(info, versions={**info.versions, **versions_of("optax")})
