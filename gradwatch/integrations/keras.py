"""`gradwatch.keras.GradWatch`: one callback for `model.fit`, on every backend of Keras 3.

`fit` reads `model.train_function` at each step, so the callback puts its own there when the training begins and gives the
old one back when it ends. The new one runs a train function that Keras makes afresh, which is traced while we sit on the
optimizer's entry point. What is compiled stays with the plain function, so that a second `fit` compiles nothing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np

from gradwatch.actions.base import Due
from gradwatch.actions.policy import Policy
from gradwatch.backends.keras_actions import CannotApplyError, KerasActions
from gradwatch.backends.keras_model import Columns, optimizers_of
from gradwatch.backends.keras_rule import Rule, base_of
from gradwatch.backends.keras_tap import Tap
from gradwatch.errors import ModelError
from gradwatch.faults import Faults
from gradwatch.integrations.keras_watcher import Call, KerasWatcher, rule_of, scales_lr
from gradwatch.records import NOT_MEASURED, Finding, Floats
from gradwatch.settings import Settings, settings_from

#: Steps between two looks at the device, when nothing that is found could change the training.
READ_EVERY = 16
#: Seconds between two looks, however slow the steps are.
READ_SECONDS = 0.5
#: Rows that a ring on the device holds at least.
RING_ROWS = 64
_MARK = "_gradwatch_instrument"


class Instrument:
    """A train function that measures, and the tap inside it; lives as long as the plain function it stands for.

    Args:
        model: A compiled model.
        policy: The actions; what of them acts inside the step is compiled in.
    """

    def __init__(self, model: keras.Model, policy: Policy) -> None:
        self.model = model
        self.session: Session | None = None
        rows = max(RING_ROWS, 4 * getattr(model, "steps_per_execution", 1))
        rule, scaled = rule_of(policy), scales_lr(policy.between)
        self.tap = tap_for(rule, scaled=scaled, rows=rows, prepare=self.prepare)
        self.function = self._make()

    @classmethod
    def of(cls, model: keras.Model, plain: Callable[..., Any], policy: Policy) -> Instrument:
        """The instrument of a model's train function: the one it has already, if it does the same."""
        key = json.dumps([policy.config(), policy.dry_run], sort_keys=True, default=str)
        known = getattr(plain, _MARK, None)
        if known is None or known[0] != key:
            known = (key, cls(model, policy))
            setattr(plain, _MARK, known)
        return known[1]

    def _make(self) -> Callable[..., Any]:
        model, before = self.model, self.model.train_function
        stepping = getattr(self.tap, "stepping", None)
        with stepping(model) if stepping else nullcontext():
            try:
                model.train_function = None
                model.make_train_function(force=True)
                return model.train_function
            finally:
                model.train_function = before

    def attached(self) -> AbstractContextManager[None]:
        """Sits on the optimizers until the block ends."""
        return self.tap.attached(self.model, optimizers_of(self.model))

    def prepare(self) -> None:
        """The model is built now: describe it, once."""
        if self.tap.columns is None:
            optimizers = optimizers_of(self.model)
            self.tap.start(Columns(self.model, optimizers), optimizers)
        if self.session is not None:
            self.session.open()


def tap_for(rule: Rule, *, scaled: bool, rows: int, prepare: Callable[[], None]) -> Tap:
    """The tap of the backend in use.

    Args:
        rule: The in-step actions.
        scaled: Whether the learning rate may be scaled.
        rows: Rows that a ring on the device holds.
        prepare: See `TensorFlowTap`.
    """
    faults, backend = Faults(), keras.backend.backend()
    if backend == "tensorflow":
        from gradwatch.backends.keras_tensorflow import TensorFlowTap

        return TensorFlowTap(rule, scales_lr=scaled, faults=faults, rows=rows, prepare=prepare)
    if backend == "torch":
        from gradwatch.backends.keras_torch import TorchTap

        return TorchTap(rule, scales_lr=scaled, faults=faults)
    if backend == "jax":
        from gradwatch.backends.keras_jax import JaxTap

        return JaxTap(rule, scales_lr=scaled, faults=faults)
    raise ModelError(f"the Keras backend must be tensorflow, torch or jax: {backend!r}")


class Session:
    """One `fit`: stands in for the train function, keeps what the host knows of each step, and applies actions.

    Args:
        model: A compiled model whose `fit` has begun.
        settings: Of the record.
        watcher_state: `Watcher.state_dict` of the session before, whose run goes on.
    """

    def __init__(self, model: keras.Model, settings: Settings, *, watcher_state: dict[str, Any] | None = None) -> None:
        self.model, self.settings, self._state = model, settings, watcher_state
        self.watcher: KerasWatcher | None = None
        self.epoch, self.batch, self.calls = 0, 0, 0
        self._before_sample: Any = None
        self._history, self._read_at = getattr(model, "history", None), 0.0
        self._call: Call | None = None
        _refuse(model)
        self.plain = _unwrapped(model)
        policy = Policy(settings.actions, dry_run=settings.dry_run)
        self.instrument = Instrument.of(model, self.plain, policy)
        self.instrument.session = self
        self.actions: KerasActions | None = None
        if self.instrument.tap.columns is not None or model.built:
            self.instrument.prepare()
        self._is_jax = keras.backend.backend() == "jax"
        if self._is_jax:
            self.instrument.tap.before_step = self._before  # type: ignore[attr-defined]
            self.instrument.tap.after_step = self._after  # type: ignore[attr-defined]
        model.train_function = self

    def open(self) -> None:
        """Begin the record; the model is described."""
        tap = self.instrument.tap
        if self.watcher is None and tap.columns is not None:
            given = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(Settings)}
            self.watcher = KerasWatcher(tap.columns, **given)
            self.watcher.micro_steps = _micro_steps(self.model)
            self.actions = KerasActions(
                self.model,
                tap.columns,
                optimizers=tap.optimizers,
                actions=self.watcher.between,
                run_dir=self.watcher.run_dir,
            )
            tap.faults = self.watcher.faults
            tap.reset()
            if self._state is not None:
                self.watcher.load_state_dict(self._state)
                tap.set_lr_factor(self.watcher.lr_factor)

    def __call__(self, *args: Any) -> Any:
        if getattr(self.model, "history", None) is not self._history:
            self.release("crashed", "fit() ended early")
            return self.plain(*args)
        if not self._is_jax:
            self._before(None)
        try:
            with self.instrument.attached():
                result = self.instrument.function(*args)
        except BaseException as error:
            if not _is_end_of_data(error):
                self.release("crashed", f"{type(error).__name__}: {error}"[:500])
            raise
        if not self._is_jax:
            self._after(None, result)
        return result

    def _before(self, state: Any) -> Any:
        """Before a step, on the host. On JAX the state of the training passes through."""
        watcher = self.watcher
        if watcher is not None:
            started = time.perf_counter()
            state = watcher.faults.call("keras host", self._look, state, default=state)
            watcher._hook_seconds += time.perf_counter() - started  # the part of Watcher that measures its own cost
        return state

    def _look(self, state: Any) -> Any:
        watcher = self.watcher
        assert watcher is not None
        if watcher.calls_waiting and self._is_time():
            self.read(lag=self._is_jax)
            for due in watcher.settle():
                state = self._act(due, state)
        if watcher.decides_between_steps and self.actions is not None:
            self.actions.watch_over(watcher.coming_step, state, is_well=watcher.is_well)
        self._call = watcher.began(epoch=self.epoch, batch=self.batch)
        self._before_sample = self._copies(state) if self._is_sampled() else None
        return state

    def _is_sampled(self) -> bool:
        """Whether this call makes one update, and the dearer statistics are due."""
        assert self.watcher is not None
        micro = self.watcher.micro_steps
        single = self._is_jax or getattr(self.model, "steps_per_execution", 1) == 1
        return single and self.calls % (self.settings.stats_every * micro) == micro - 1

    def _trained(self, state: Any) -> tuple[list[Any], list[Any]]:
        """The variables in training and their values."""
        variables = self.model.trainable_variables
        return variables, [v.value for v in variables] if state is None else list(state[0])

    def _copies(self, state: Any) -> Any:
        return self.instrument.tap.copies(self._trained(state)[1])

    def _changes(self, before: Any, state: Any) -> Callable[[], tuple[Floats, Floats]]:
        tap, (variables, values) = self.instrument.tap, self._trained(state)
        found = tap.changes(before, values)

        def read() -> tuple[Floats, Floats]:
            norms = np.full((2, tap.width), NOT_MEASURED, np.float32)
            columns = [tap.columns.of(variable) for variable in variables]  # type: ignore[union-attr]
            norms[:, columns] = np.asarray(found)
            return norms[0], norms[1]

        return read

    def _act(self, due: Due, state: Any) -> Any:
        """Apply an action and record it; on JAX to the state of the training, which is returned."""
        watcher, done = self.watcher, ""
        assert watcher is not None
        assert self.actions is not None
        try:
            if not watcher.settings.dry_run:
                state, done = self.actions.apply(due, state)
        except CannotApplyError as error:
            watcher.monitor.could_not_act(due, watcher.coming_step, str(error))
            return state
        watcher.monitor.acted(due, watcher.coming_step, detail=done)
        self.instrument.tap.set_lr_factor(watcher.lr_factor)
        return state

    def _is_time(self) -> bool:
        watcher = self.watcher
        assert watcher is not None
        due = watcher.decides_between_steps or watcher.calls_waiting >= max(1, READ_EVERY // watcher.rows_per_call)
        return due or self._read_at == 0.0 or time.monotonic() - self._read_at > READ_SECONDS

    def read(self, *, lag: bool = False) -> None:
        """Take the rows that left the device."""
        assert self.watcher is not None
        rows = self.instrument.tap.drain(lag=lag)
        self.watcher.take(rows, calls=self.watcher.calls_waiting - lag)
        self._read_at = time.monotonic()

    def _after(self, state: Any, logs: Any) -> None:
        watcher = self.watcher
        if watcher is not None:
            started = time.perf_counter()
            call = self._call or watcher.began(epoch=self.epoch, batch=self.batch)
            if self._before_sample is not None:
                before, self._before_sample = self._before_sample, None
                call.changes = watcher.faults.call("keras sample", self._changes, before, state, default=None)
            watcher.faults.call("keras host", watcher.ran, call, logs, default=None)
            watcher._hook_seconds += time.perf_counter() - started
        self._call = None
        self.calls += 1
        self.batch += 1 if self._is_jax else getattr(self.model, "steps_per_execution", 1)

    def epoch_ended(self, logs: dict[str, Any]) -> None:
        """Everything the epoch did is taken; validation metrics go to its last step."""
        if self.watcher is not None:
            self.watcher.faults.call("keras host", self.read, default=None)
            self.watcher.epoch_ended(logs)

    def release(self, status: str = "finished", detail: str = "") -> dict[str, Any] | None:
        """Give the model its train function back and end the record; what the next session goes on from."""
        if self.model.train_function is self:
            self.model.train_function = self.plain
        self.instrument.session = None
        watcher = self.watcher
        if watcher is None:
            return None
        watcher.on_close = None
        watcher.faults.call("keras host", self.read, default=None)
        watcher.faults.call("keras host", watcher.settle, default=[])
        self.watcher = None
        state = watcher.faults.call("keras host", watcher.state_dict, default=None)
        watcher.close(status, detail)
        if self.actions is not None:
            self.actions.close()
        return state


def _micro_steps(model: keras.Model) -> int:
    optimizer = getattr(model, "optimizer", None)
    return getattr(base_of(optimizer), "gradient_accumulation_steps", None) or 1


def _is_end_of_data(error: BaseException) -> bool:
    return isinstance(error, StopIteration) or type(error).__name__ == "OutOfRangeError"


def _unwrapped(model: keras.Model) -> Callable[..., Any]:
    """The model's own train function; a session that a dead `fit` left behind is ended."""
    function = model.train_function
    if isinstance(function, Session):
        function.release("crashed", "fit() ended early")
        function = model.train_function
    if function is None:
        model.make_train_function()
        function = model.train_function
    return function


def _refuse(model: keras.Model) -> None:
    if keras.backend.backend() == "jax" and keras.config.is_nnx_enabled():
        raise ModelError("Keras with NNX enabled cannot be watched: unset KERAS_NNX_ENABLED")
    if not isinstance(model, keras.Model):
        raise ModelError(f"'model' must be a Keras model: {type(model).__name__}")


class GradWatch(keras.callbacks.Callback):
    """Watches a Keras model while `fit` trains it.

    Records the gradient norm of every variable at every optimizer step, looks for what goes wrong, and applies the actions
    that were asked for. Without actions the training stays bit-identical. The same callback in a second `fit` goes on with
    the same run.

    Args:
        settings: `run_dir`, `actions`, `alerts`, `sinks`, `detectors` and the other fields of
            `gradwatch.settings.Settings`.

    Raises:
        ConfigurationError: A setting breaks a rule.
        ModelError: When `fit` begins: the model cannot be watched.
        RunExistsError: When `fit` begins: there is a run at `run_dir`; say `resume=True` or `overwrite=True`.

    Examples:
        >>> import keras, numpy as np, tempfile
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> watch = GradWatch(run_dir=tempfile.mkdtemp() + "/run")
        >>> _ = model.fit(np.ones((8, 3)), np.ones(8), batch_size=4, verbose=0, callbacks=[watch])
        >>> watch.findings
        []
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = settings_from(settings)
        Policy(self._settings.actions)
        self._session: Session | None = None
        self._last: KerasWatcher | None = None
        self._state: dict[str, Any] | None = None

    @property
    def watcher(self) -> KerasWatcher | None:
        """The watcher of the fit in progress, or of the last one; None before the first."""
        session = self._session
        return session.watcher if session is not None and session.watcher is not None else self._last

    @property
    def findings(self) -> list[Finding]:
        """All findings so far."""
        return self.watcher.findings if self.watcher is not None else []

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin to watch."""
        settings = self._settings
        if self._session is not None:
            self._state = self._session.release("crashed", "fit() ended early") or self._state
            self._session = None
        if self._last is not None:
            settings = dataclasses.replace(settings, run_dir=self._last.run_dir, resume=True, overwrite=False)
        # `self.model` would make the JAX trainer write its whole state back.
        self._session = Session(self._model, settings, watcher_state=self._state)
        self._last = self._session.watcher

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count epochs and batches."""
        if self._session is not None:
            self._session.epoch, self._session.batch = epoch, 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Take validation metrics."""
        if self._session is not None:
            self._last = self._session.watcher or self._last
            self._session.epoch_ended(logs or {})

    def on_train_end(self, logs: Any = None) -> None:
        """Stop watching; the model is as it was."""
        session, self._session = self._session, None
        if session is not None:
            self._last = session.watcher or self._last
            self._state = session.release()
