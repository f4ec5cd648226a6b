"""The watcher of a Keras model: makes steps of the record from rows that left the device and what the host knows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import keras
import numpy as np
import numpy.typing as npt

from gradwatch.actions.base import BetweenStepsAction, Due
from gradwatch.actions.policy import Policy
from gradwatch.backends.keras_actions import CannotApplyError, KerasActions
from gradwatch.backends.keras_model import Columns
from gradwatch.backends.keras_rule import EXTRAS, Rule
from gradwatch.backends.keras_tap import Tap
from gradwatch.provenance import _versions as versions_of
from gradwatch.records import NOT_MEASURED, RENEWED, Floats, RunInfo
from gradwatch.rows import Rows, number
from gradwatch.settings import Options
from gradwatch.watcher import Watcher

#: Reads what was sampled from the device; only when it is taken does anybody wait for it.
Statistics = Callable[[], dict[str, Floats]]

_OPTIMIZER, _LR, _LOSS, _COEFFICIENT, _SKIP, _IS_UPDATE, _GRAD_SCALE = range(len(EXTRAS))


#: Steps that the monitor is shown at once at most.
ROWS_TOGETHER = 64


@dataclass
class Call:
    """One run of the compiled train function, as the host saw it.

    Args:
        started: Unix time.
        epoch: Number of the epoch; None outside of `fit`.
        batch: Number of the first batch in the epoch.
        lr_factor: gradwatch's factor on the learning rate.
        ended: Unix time.
        logs: What the train function returned; scalars of the framework, not yet read.
        statistics: Each gives what was sampled, by name of the statistic.
        is_renewed: Whether a remedy gave the network other weights before it.
    """

    started: float
    epoch: int | None
    batch: int
    lr_factor: float
    ended: float = 0.0
    logs: Mapping[str, Any] = field(default_factory=dict)
    statistics: list[Statistics] = field(default_factory=list)
    is_renewed: bool = False


@dataclass
class _Row:
    call: Call
    norms: npt.NDArray[np.float32]
    metrics: dict[str, float]
    skip_reason: int = 0
    stepped: set[int] = field(default_factory=set)
    statistics: dict[str, Floats] = field(default_factory=dict)


class KerasWatcher(Watcher):
    """Watches a Keras model; fed by `gradwatch.keras.GradWatch` or by the hooks of `gradwatch.watch`.

    Args:
        columns: The variables to train.
        modules: Names of the layers whose outputs are sampled.
        settings: Keyword arguments of `gradwatch.settings.Settings`.
    """

    def __init__(self, columns: Columns, *, modules: Sequence[str] = (), **settings: Unpack[Options]) -> None:
        self._columns = columns
        self._calls: deque[Call] = deque()
        self._pending: list[_Row] = []
        self._rows_per_call = 1
        self._is_renewed = self._owes_renewal = False
        #: Calls that make one update, with gradient accumulation.
        self.micro_steps = 1
        self._taken_at = time.time()
        self.on_close: Callable[[str, str], object] | None = None
        settings["record"] = settings.get("record", True) and columns.is_chief
        super().__init__(columns.parameters, framework="keras", modules=modules, **settings)

    def _new_rows(self) -> None:
        self._is_waiting = True  # `settle` says when it is time to look
        capacity = max(ROWS_TOGETHER, self.settings.check_every)
        self._rows = Rows(self._parameters, modules=self._modules, capacity=capacity)

    @property
    def decides_between_steps(self) -> bool:
        """Whether the monitor's verdict may change the training."""
        return bool(self._policy.between)

    @property
    def between(self) -> list[BetweenStepsAction]:
        """The actions between steps."""
        return self._policy.between

    @property
    def is_well(self) -> bool:
        """Whether no finding of concern is open."""
        return self._policy.is_well

    @property
    def coming_step(self) -> int:
        """The number of the step that has not begun yet."""
        waiting = len(self._calls) * self._rows_per_call // self.micro_steps
        return self._next_step + len(self._pending) + waiting

    @property
    def lr_factor(self) -> float:
        """Gradwatch's factor on the learning rate, as applied."""
        return 1.0 if self.settings.dry_run else self._policy.state.lr_factor

    @property
    def rows_per_call(self) -> int:
        """Rows that one call of the train function writes, as far as seen."""
        return self._rows_per_call

    @property
    def calls_waiting(self) -> int:
        """Calls whose rows were not taken yet."""
        return len(self._calls)

    def began(self, *, epoch: int | None, batch: int) -> Call:
        """A train function is about to run."""
        is_renewed, self._is_renewed = self._is_renewed, False
        return Call(time.time(), epoch, batch, self.lr_factor, is_renewed=is_renewed)

    def ran(self, call: Call, logs: Any) -> None:
        """It ran; its rows may still be on the device."""
        call.ended = time.time()
        call.logs = logs if isinstance(logs, Mapping) else {}
        self._calls.append(call)

    def take(self, rows: Floats, *, calls: int | None = None) -> None:
        """Take rows from the device.

        Args:
            rows: Shape (k, p + len(EXTRAS)), in order.
            calls: The calls that wrote them, of those that ran; by default all.
        """
        calls = len(self._calls) if calls is None else min(calls, len(self._calls))
        if not calls:
            return
        done = [self._calls.popleft() for _ in range(calls)]
        self._rows_per_call = max(self._rows_per_call, -(-len(rows) // calls))
        owner = [min(i // self._rows_per_call, calls - 1) for i in range(len(rows))]
        found: dict[int, list[_Row]] = {}
        for place, values in zip(owner, rows, strict=True):
            self._add(done[place], values, found.setdefault(place, []))
        for place, new in found.items():
            self._complete(done[place], new)
            self._pending += new

    def take_in_order(self, rows: Floats) -> None:
        """Take rows of a loop that nobody counts the calls of; optimizers that take turns share a step."""
        now = self.began(epoch=None, batch=0)
        now.started, now.ended = self._taken_at, now.started
        first = len(self._pending)
        for values in rows:
            self._add(now, values, self._pending)
        self._complete(now, self._pending[first:])
        self._taken_at = now.ended

    def _add(self, call: Call, values: npt.NDArray[np.float32], rows: list[_Row]) -> None:
        norms, extras = values[: -len(EXTRAS)], values[-len(EXTRAS) :]
        if not extras[_IS_UPDATE]:
            return
        who = int(extras[_OPTIMIZER])
        if not rows or who in rows[-1].stepped:
            rows.append(_Row(call, np.full(len(norms), NOT_MEASURED, np.float32), {"lr_factor": call.lr_factor}))
        row = rows[-1]
        row.norms = np.where(norms == np.float32(NOT_MEASURED), row.norms, norms)
        row.metrics["lr" if not row.stepped else f"lr.{who}"] = float(extras[_LR])
        if extras[_LOSS] != NOT_MEASURED:
            row.metrics.setdefault("loss", float(extras[_LOSS]))
        if extras[_GRAD_SCALE] != NOT_MEASURED:
            row.metrics.setdefault("grad_scale", float(extras[_GRAD_SCALE]))
        coefficient = float(extras[_COEFFICIENT])
        row.metrics["clip_coefficient"] = min(coefficient, row.metrics.get("clip_coefficient", math.inf))
        row.skip_reason = max(row.skip_reason, int(extras[_SKIP]))
        row.stepped.add(who)

    def _complete(self, call: Call, rows: list[_Row]) -> None:
        """Add what the host knows of a call to its rows."""
        for i, row in enumerate(rows):
            row.metrics["time"] = call.started + (call.ended - call.started) * (i + 1) / len(rows)
            if call.epoch is not None:
                row.metrics["epoch"] = float(call.epoch)
                row.metrics["batch"] = float(call.batch + i)
        self._owes_renewal = self._owes_renewal or call.is_renewed
        if not rows:
            return
        if self._owes_renewal:
            self._owes_renewal = False
            rows[0].metrics[RENEWED] = 1.0
        for name, value in call.logs.items():
            rows[-1].metrics.setdefault(name, _scalar(value))
        for read in call.statistics:
            rows[-1].statistics |= read()

    def epoch_ended(self, logs: Mapping[str, Any]) -> None:
        """Validation metrics belong to the newest step."""
        found = {name: _scalar(value) for name, value in logs.items() if name.startswith("val_")}
        if self._pending:
            self._pending[-1].metrics.update(found)
        else:
            self._logged.update(found)

    def settle(self, *, keep: int = 0) -> list[Due]:
        """Close the steps whose rows were taken, but for the newest `keep`; what is due before the next step."""
        count = len(self._pending) - keep
        rows, self._pending = self._pending[:count], self._pending[count:]
        due = [
            self._close_row(row.norms, row.metrics, statistics=row.statistics, skip_reason=row.skip_reason)
            for row in rows
        ]
        # What came together is looked at together: detectors cost by the batch, and find the same.
        if len(self._rows) >= self.settings.check_every:
            due.append(self._check())
        return [each for each in due if each is not None]

    def finish(self) -> None:
        """Close all steps that were taken, before the watcher is closed."""
        none: list[Due] = []
        self.faults.call("keras host", self.settle, default=none)

    def act(self, due: Due, actions: KerasActions, tap: Tap, state: Any = None) -> Any:
        """Apply an action between steps and record it.

        Args:
            due: What the policy decided.
            actions: Apply it.
            tap: Hears what follows for the steps to come.
            state: JAX's, of the training inside `fit`.

        Returns:
            JAX's state, changed.

        Raises:
            StopTraining: It is a `Stop`, and `on_stop` does nothing else about it.
        """
        is_dry, done = self.settings.dry_run, ""
        try:
            if not is_dry:
                state, done = actions.apply(due, state)
        except CannotApplyError as error:
            self.monitor.could_not_act(due, self.coming_step, str(error))
            return state
        self.monitor.acted(due, self.coming_step, detail=done)
        tap.set_lr_factor(self.lr_factor)
        if not is_dry:
            self._is_renewed = self._is_renewed or due.action.renews
            if due.action.begins_anew:
                tap.begin_anew()
            if due.action.name == "Stop":
                self.on_stop(due.detail)
        return state

    def note_cost(self, seconds: float) -> None:
        """Count time that we took on the host."""
        self._hook_seconds += seconds

    def _log(self, numbers: Mapping[str, Any]) -> None:
        known = {name: number(name, value) for name, value in numbers.items()}
        if self._calls:
            self._calls[-1].logs = {**self._calls[-1].logs, **known}
        elif self._pending:
            self._pending[-1].metrics.update(known)
        else:
            super()._log(known)

    def has_stepped(self, number: int) -> bool:
        """Whether this optimizer is in the newest step already."""
        return bool(self._pending) and number in self._pending[-1].stepped

    def close(self, status: str = "finished", detail: str = "") -> None:
        """See `Watcher.close`."""
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close(status, detail)
        super().close(status, detail)

    def _info(self) -> RunInfo:
        info = super()._info()
        backend = keras.backend.backend()
        versions = {**info.versions, **versions_of(backend)}
        return dataclasses.replace(info, versions=versions, config={**info.config, "backend": backend})


def rule_of(policy: Policy) -> Rule:
    """The in-step actions of a policy."""
    return Rule(policy.in_step, dry_run=policy.dry_run)


def scales_lr(actions: Sequence[BetweenStepsAction]) -> bool:
    """Whether one of these may scale the learning rate."""
    return any(action.only_rate or action.name in ("Rollback", "Reinitialize") for action in actions)


def _scalar(value: Any) -> float:
    try:
        found = float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError):
        return NOT_MEASURED
    return math.nan if found == NOT_MEASURED else found
