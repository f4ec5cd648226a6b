"""The watcher: takes measured steps one by one, runs the monitor over them, and is what the user holds."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np

from gradwatch.actions.base import Due
from gradwatch.actions.policy import Policy
from gradwatch.at_exit import close_at_exit
from gradwatch.detectors.base import RunContext
from gradwatch.detectors.engine import Engine
from gradwatch.errors import ConfigurationError, StopTraining, UnknownNameError, WatcherClosedError
from gradwatch.faults import Faults
from gradwatch.monitor import Monitor
from gradwatch.provenance import default_run_dir, provenance
from gradwatch.records import STAGES, Finding, Floats, Parameter, RunInfo
from gradwatch.rows import Rows, checked_norms, global_norm, number
from gradwatch.settings import Options, checked_parameters, settings_from
from gradwatch.writer import NoWriter, RunWriter

#: Quick steps that are looked at together where nobody acts on findings, and for how many seconds the first one waits.
TOGETHER, LATEST = 16, 0.25


class Watcher:
    """Records steps, finds what goes wrong in them, and says what to do.

    For a framework that gradwatch does not know: feed `observe` with the norms of each step. `gradwatch.watch` returns
    a watcher that feeds itself.

    Args:
        parameters: What is measured, in the order of the arrays.
        framework: Name of the framework, for the record and for the words of the advice.
        modules: Modules whose outputs are sampled, in the order of the arrays of module statistics.
        settings: Keyword arguments of `Settings`, such as `run_dir`.

    Examples:
        >>> import numpy as np, tempfile
        >>> parameters = [Parameter("conv1.weight", depth=0), Parameter("fc.weight", depth=1)]
        >>> with Watcher(parameters, run_dir=tempfile.mkdtemp() + "/run") as watcher:
        ...     due = watcher.observe(step=0, grad_norm=np.array([0.5, 2.0]), loss=0.7)
        >>> due
        []
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        *,
        framework: str = "",
        modules: Sequence[str] = (),
        **settings: Unpack[Options],
    ) -> None:
        self.settings = settings_from(settings)
        self.faults = Faults()
        self._parameters = checked_parameters(parameters)
        self._modules = tuple(modules)
        self._framework = framework
        self._policy = Policy(self.settings.actions, dry_run=self.settings.dry_run)
        self._engine = Engine(self.settings.detectors, self._context())
        self._loaded: Mapping[str, Any] = {}
        info = self._info()
        self._writer = (RunWriter if self.settings.record else NoWriter)(
            self.settings.run_dir or default_run_dir(),
            info,
            overwrite=self.settings.overwrite,
            resume=self.settings.resume,
            flush_every=self.settings.flush_every,
            flush_seconds=self.settings.flush_seconds,
        )
        try:
            self._begin(info)
        except BaseException:
            self._abandon()
            raise

    def _begin(self, info: RunInfo) -> None:
        """Everything behind the writer, which has threads by now."""
        listeners = [*self.settings.alerts, *self.settings.sinks] if self.settings.record else []
        self.monitor = Monitor(
            writer=self._writer, engine=self._engine, policy=self._policy, listeners=listeners, faults=self.faults
        )
        #: Whether somebody acts on a finding or is told of it at once; else a few quick steps are looked at together.
        self._is_urgent = bool(self._policy.between or listeners)
        self._new_rows()
        self._next_step = self.settings.start_step if self.settings.start_step is not None else self._writer.next_step
        self._logged: dict[str, float] = {}
        self._hook_seconds, self._step_seconds, self._steps_seen = 0.0, 0.0, 0
        self._last_time, self._looked = 0.0, time.perf_counter()
        self._last_norms: Floats | None = None
        self._closed = False
        #: What `Stop` does with its message; by default it raises `StopTraining` at the step boundary.
        self.on_stop: Callable[[str], None] = _raise_stop
        self._pid = os.getpid()
        self._exit = close_at_exit(self)
        self.monitor.open(info, self.run_dir, self._next_step)

    def _abandon(self) -> None:
        """The watcher could not begin: let go of the threads."""
        self._closed = True
        owner = getattr(self, "monitor", None)
        end = partial(owner.close, overhead=dict) if owner is not None else self._writer.close
        self.faults.let_go("begin", partial(end, "crashed", "could not begin"))

    @property
    def run_dir(self) -> Path:
        """Where the record is."""
        return Path(self._writer.path)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def findings(self) -> list[Finding]:
        """All findings so far, in order of their opening."""
        self._catch_up()
        return list(self.monitor.findings.values())

    @property
    def last_global_norm(self) -> float | None:
        """Global gradient norm of the last recorded step; None before the first."""
        return None if self._last_norms is None else global_norm(self._last_norms)

    def observe(
        self,
        *,
        grad_norm: Floats | Sequence[float],
        step: int | None = None,
        stage: str = "pre_clip",
        statistics: Mapping[str, Floats] | None = None,
        **metrics: float,
    ) -> list[Due]:
        """Take one step.

        Args:
            grad_norm: L2 norms of shape (p,), in the order of the parameters; NaN or inf as the gradient is,
                `NOT_MEASURED` (minus infinity) for a parameter without gradient.
            step: Its number; by default one more than the last.
            stage: `pre_clip` or `post_clip`: where the norms were taken.
            statistics: Names of `PARAMETER_STATISTICS` to arrays of shape (p,).
            metrics: Such as `loss`, `lr`; anything else is recorded under its name.

        Returns:
            The actions that are due before the next step; the caller applies them and calls `applied`.

        Raises:
            WatcherClosedError: After `close`.
            ConfigurationError: When an array has the wrong shape.
        """
        self._require_open()
        due = self.faults.for_user("observe", self._observe, grad_norm, step, stage, statistics or {}, metrics)
        return [due] if due else []

    def _observe(
        self,
        grad_norm: Floats | Sequence[float],
        step: int | None,
        stage: str,
        statistics: Mapping[str, Floats],
        metrics: Mapping[str, Any],
    ) -> Due | None:
        norms = checked_norms(grad_norm, statistics, len(self._parameters))
        if stage not in STAGES:
            raise UnknownNameError.among("stage", stage, STAGES)
        if step is not None and step < self._next_step:
            raise ConfigurationError.of("step", f">= {self._next_step} (steps ascend)", step)
        numbers = {name: number(name, value) for name, value in metrics.items()}
        self._next_step = self._next_step if step is None else step
        return self._close_row(norms, numbers, statistics=dict(statistics), stage=STAGES.index(stage))

    def applied(self, due: Due) -> None:
        """Say that an action returned by `observe` was applied."""
        self.faults.for_user("actions", self.monitor.acted, due, self._next_step)

    def log(self, **numbers: Any) -> None:
        """Add numbers to the record of the current step.

        Args:
            numbers: Names to numbers or scalar tensors, such as `loss=loss`.

        Raises:
            WatcherClosedError: After `close`.
            ConfigurationError: For a value that is no number.
        """
        self._require_open()
        self.faults.for_user("log", self._log, numbers)

    def _log(self, numbers: Mapping[str, Any]) -> None:
        for name, value in numbers.items():
            self._logged[name] = number(name, value)

    def mark(self, text: str) -> None:
        """Note something in the record at the current step, such as "unfroze the backbone"."""
        self._require_open()
        self.monitor.mark(text, self._next_step)

    def _close_row(
        self,
        norms: Floats,
        metrics: dict[str, float],
        *,
        statistics: dict[str, Floats] | None = None,
        stage: int = 0,
        skip_reason: int = 0,
    ) -> Due | None:
        """Complete a step and, when it is time, run the monitor over what has gathered."""
        now = metrics.setdefault("time", time.time())
        if self._last_time:
            metrics.setdefault("step_time", now - self._last_time)
        self._last_time = now
        if self._logged:
            metrics = {**metrics, **self._logged}
            self._logged = {}
        self._last_norms = norms
        metrics.setdefault("lr_factor", self._policy.state.lr_factor)
        metrics.setdefault("skipped", float(skip_reason > 0))
        self._rows.add(self._next_step, norms, metrics, statistics=statistics, stage=stage, skip_reason=skip_reason)
        self._next_step += 1
        self._steps_seen += 1
        self._step_seconds += metrics.get("step_time", 0.0)
        if self._rows.is_full or (not self._is_waiting and time.perf_counter() - self._looked >= LATEST):
            return self._check()
        return None

    def _check(self) -> Due | None:
        self._looked = time.perf_counter()
        if not len(self._rows):
            return None
        with np.errstate(all="ignore"):  # whatever the user lets numpy do about NaN
            self._rows.tell(self.monitor.record)
            return self.monitor.look(self._rows.take())

    def _catch_up(self) -> None:
        """Look now at what waits for company, where looking can call for no action."""
        if not self._is_urgent and not self._closed:
            self.faults.for_user("check", self._check)

    def _new_rows(self) -> None:
        together = self.settings.check_every
        #: Whether steps wait for each other however long that takes.
        self._is_waiting = together > 1 or self._is_urgent
        if not self._is_waiting:
            together = min(TOGETHER, max(1, self.settings.flush_every // 4))
        self._rows = Rows(self._parameters, modules=self._modules, capacity=together)
        self._writer.ask_when_idle(self._rows.tell)

    def _redescribe(self, parameters: Sequence[Parameter]) -> None:
        """Take better descriptions of the same parameters (the order of execution), before the first step is closed."""
        self._check()
        self._parameters = tuple(parameters)
        self._engine = self.monitor.engine = Engine(self.settings.detectors, self._context())
        if self._loaded:
            self._engine.load_state_dict(self._loaded)
        self._new_columns()

    def _gain(self, parameter: Parameter) -> None:
        """Take one parameter more, which becomes the last column."""
        self._check()
        self._parameters = (*self._parameters, parameter)
        self._engine.extend(self._context())
        self._new_columns()

    def _new_columns(self) -> None:
        self._new_rows()
        self.faults.call("writer", self._writer.update_info, parameters=self._parameters, default=None)

    def _context(self) -> RunContext:
        return RunContext(self._parameters, framework=self._framework)

    def state_dict(self) -> dict[str, Any]:
        """Baselines of the detectors and state of the actions, for the user's own checkpoints."""
        self._require_open()
        self._check()
        return {
            "next_step": self._next_step,
            "detectors": self._engine.state_dict(),
            "actions": self._policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: nothing is learnt anew after a resume.

        Raises:
            ConfigurationError: When the state belongs to other parameters, detectors or actions.
        """
        self._require_open()
        self._loaded = state["detectors"]
        self._engine.load_state_dict(self._loaded)
        self._policy.load_state_dict(state["actions"])
        self._next_step = int(state["next_step"])

    def overhead(self) -> dict[str, Any]:
        """What gradwatch costs this run, measured by itself: seconds in its hooks, bytes written, own failures."""
        return {
            "steps": self._steps_seen,
            "hook_seconds": self._hook_seconds,
            "step_seconds": self._step_seconds,
            "bytes_written": self._writer.bytes_written,
            "dropped_steps": self._writer.dropped_steps,
            "errors": dict(self.faults.messages),
            "failures": {**self.monitor.failures(), **self.faults.counts},
        }

    def close(self, status: str = "finished", detail: str = "") -> None:
        """Flush the record and let go of everything. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for _ in (1, 2):
            try:
                self._end(status, detail)
            except Exception as error:  # noqa: BLE001 -- whatever fails here is ours, and tried again
                self.faults.note("close", error)
            except BaseException:
                self.faults.let_go("close", partial(self._end, status, detail))
                self._closed = False  # interrupted: it can be closed again
                raise
            else:
                break

    def _end(self, status: str, detail: str) -> None:
        parts = self._endings(status)
        if os.getpid() == self._pid:
            parts += [partial(self.faults.call, "check", self._check, default=None)]
            parts += [partial(self.monitor.close, status, detail, self.overhead)]
            parts += [partial(atexit.unregister, self._exit)]
        self.faults.let_go("close", *parts)

    def _endings(self, status: str) -> list[Callable[[], object]]:
        """What is let go of before the record ends, each callable twice."""
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.close("crashed", f"{kind.__name__}: {error}")

    def __del__(self) -> None:
        # Dropped without `close`. At interpreter exit the one registered with atexit has come first.
        try:
            if not getattr(self, "_closed", True):
                self.close()
        except Exception:  # noqa: BLE001 -- nobody can be told here
            return

    def __repr__(self) -> str:
        state = "closed" if self._closed else "watching"
        return (
            f"<{type(self).__name__} {state} {len(self._parameters)} parameters, "
            f"{self._steps_seen} steps, {len(self.monitor.findings)} findings, run_dir={str(self.run_dir)!r}>"
        )

    def _repr_html_(self) -> str:
        from gradwatch.run import load

        return load(self.run_dir).summary()._repr_html_()

    def _require_open(self) -> None:
        if self._closed:
            raise WatcherClosedError(f"the watcher of {str(self.run_dir)!r} is closed")

    def _info(self) -> RunInfo:
        config: dict[str, Any] = {
            "detectors": self._engine.config(),
            "actions": self._policy.config(),
            "stats_every": self.settings.stats_every,
            "check_every": self.settings.check_every,
            "flush_every": self.settings.flush_every,
            "dry_run": self.settings.dry_run,
        }
        if self.settings.preflight is not None:
            config["preflight"] = self.settings.preflight.to_json()
        return provenance(self._parameters, self._modules, framework=self._framework, config=config)


def _raise_stop(message: str) -> None:
    raise StopTraining(message)
