"""One training of a Keras model, from the moment the train function is replaced until it is given back."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import keras
import numpy as np

from gradwatch.actions.policy import Policy
from gradwatch.backends.keras_actions import KerasActions
from gradwatch.backends.keras_model import Columns
from gradwatch.backends.keras_rule import base_of
from gradwatch.backends.keras_samples import parts
from gradwatch.errors import ModelError, StopTraining
from gradwatch.integrations.keras_instrument import Instrument
from gradwatch.integrations.keras_watcher import Call, KerasWatcher, Statistics
from gradwatch.records import NOT_MEASURED, Floats
from gradwatch.settings import Settings

#: Steps between two looks at the device, when nothing that is found could change the training.
READ_EVERY = 16
#: Seconds between two looks, however slow the steps are.
READ_SECONDS = 0.5


class Session:
    """One `fit`: stands in for the train function, keeps what the host knows of each step, and applies actions.

    Args:
        model: A compiled model whose `fit` has begun.
        settings: Of the record.
        watcher_state: `Watcher.state_dict` of the session before, whose run goes on.
        stop: What `Stop` does; by default it raises `StopTraining`.
    """

    def __init__(
        self,
        model: keras.Model,
        settings: Settings,
        *,
        watcher_state: dict[str, Any] | None = None,
        stop: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.settings, self._state, self._stop = model, settings, watcher_state, stop
        self.watcher: KerasWatcher | None = None
        self.epoch, self.batch, self.calls = 0, 0, 0
        self._before_sample: Any = None
        self._sampled = False
        self._trained: Trained | None = None
        self._history, self._read_at = getattr(model, "history", None), 0.0
        self._call: Call | None = None
        _refuse(model)
        self.plain = _unwrapped(model)
        policy = Policy(settings.actions, dry_run=settings.dry_run)
        self.instrument = Instrument.of(model, self.plain, policy, activations=settings.activations)
        self.instrument.on_ready = self.open
        self.actions: KerasActions | None = None
        if self.instrument.tap.columns is not None or model.built:
            self.instrument.prepare()
        self._is_jax = keras.backend.backend() == "jax"
        #: How many batches a call takes.
        self._batches: int = 1 if self._is_jax else getattr(model, "steps_per_execution", 1)
        if self._is_jax:
            self.instrument.tap.before_step = self._before  # type: ignore[attr-defined]
            self.instrument.tap.after_step = self._after  # type: ignore[attr-defined]
        model.train_function = self

    def open(self) -> None:
        """Begin the record; the model is described."""
        tap = self.instrument.tap
        if self.watcher is None and tap.columns is not None:
            given = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(Settings)}
            self.watcher = KerasWatcher(tap.columns, modules=self.instrument.sampler.modules, **given)
            try:
                self._begin(self.watcher, tap.columns)
            except BaseException:
                self.watcher.close("crashed", "could not begin")
                raise

    def _begin(self, watcher: KerasWatcher, columns: Columns) -> None:
        tap = self.instrument.tap
        watcher.micro_steps = _micro_steps(self.model)
        watcher.on_stop = self._stop or watcher.on_stop
        self.actions = KerasActions(
            self.model, columns, optimizers=tap.optimizers, actions=watcher.between, run_dir=watcher.run_dir
        )
        tap.faults = watcher.faults
        tap.reset()
        if self._state is not None:
            watcher.load_state_dict(self._state)
            tap.set_lr_factor(watcher.lr_factor)

    def __call__(self, *args: Any) -> Any:
        if getattr(self.model, "history", None) is not self._history:
            self.release("crashed", "fit() ended early")
            return self.plain(*args)
        try:
            return self._step(*args)
        except BaseException as error:
            if not (isinstance(error, StopTraining) or _is_end_of_data(error)):
                self.release("crashed", f"{type(error).__name__}: {error}"[:500])
            raise

    def _step(self, *args: Any) -> Any:
        if not self._is_jax:
            self._before(None)
        faults = self.instrument.tap.faults
        sitting = faults.call("keras tap", self._sit, default=None)
        if sitting is None:
            return self.plain(*args)
        try:
            result = self.instrument.function(*args)
        finally:
            faults.let_go("keras tap", sitting.close)
        if not self._is_jax:
            self._after(None, result)
        return result

    def _sit(self) -> ExitStack:
        """Sit on the optimizers until what is returned is closed."""
        sitting = ExitStack()
        sitting.enter_context(self.instrument.attached())
        return sitting

    def _before(self, state: Any) -> Any:
        """Before a step, on the host. On JAX the state of the training passes through."""
        watcher = self.watcher
        if watcher is None:
            return state
        return watcher.faults.call("keras host", self._timed, watcher, self._look, state, default=state)

    def _timed(self, watcher: KerasWatcher, work: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        result = work(*args)
        watcher.note_cost(time.perf_counter() - started)
        return result

    def _look(self, state: Any) -> Any:
        watcher = self.watcher
        assert watcher is not None
        assert self.actions is not None
        if (lag := self._lag()) is not None:
            self.read(lag=lag)
            for due in watcher.settle():
                state = watcher.act(due, self.actions, self.instrument.tap, state)
        if watcher.decides_between_steps:
            self.actions.watch_over(watcher.coming_step, state, is_well=watcher.is_well)
        self._call = watcher.began(epoch=self.epoch, batch=self.batch)
        self._sampled = self._is_sampled()
        self.instrument.tap.set_sampling(self._sampled)
        single = self._batches == 1
        self._before_sample = self._copies(state) if self._sampled and single else None
        return state

    def _is_sampled(self) -> bool:
        """Whether the dearer statistics are due in this call."""
        assert self.watcher is not None
        micro = self.watcher.micro_steps
        return self.calls % (self.settings.stats_every * micro) == micro - 1

    def _copies(self, state: Any) -> Any:
        """Variables in training, their places, and what they hold before the step."""
        self._trained = self._trained or Trained(self.model)
        variables, places = self._trained.next_part()
        return variables, places, self.instrument.tap.copies(_values(variables, places, state))

    def _changes(self, copies: Any, state: Any) -> Statistics:
        """Norms of weights, and of their changes over these."""
        tap, (variables, places, before) = self.instrument.tap, copies
        found = tap.changes(before, _values(variables, places, state))

        def read() -> dict[str, Floats]:
            norms, values = np.full((2, tap.width), NOT_MEASURED, np.float32), np.asarray(found)
            norms[:, [tap.column_of(variable) for variable in variables]] = values
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(norms[0] > 0, norms[1] / norms[0], np.float32(NOT_MEASURED))
            return {"weight_norm": norms[0], "update_ratio": ratio}

        return read

    def _sample(self) -> Statistics:
        """What was measured inside the step."""
        tap, sampler = self.instrument.tap, self.instrument.sampler
        found = tap.sample()
        return lambda: sampler.taken_apart(np.asarray(found), tap.width)

    def _lag(self) -> int | None:
        """How many of the newest rows to leave on the device when it is time to look; None when it is not.

        Only JAX computes ahead: rows that are not ready yet would be waited for.
        """
        watcher = self.watcher
        assert watcher is not None
        is_late = self._read_at == 0.0 or time.monotonic() - self._read_at > READ_SECONDS
        at_once = watcher.decides_between_steps or is_late
        lag = 0 if not self._is_jax else 1 if at_once else READ_EVERY // 2
        together = 1 if at_once else max(1, READ_EVERY // watcher.rows_per_call)
        return lag if watcher.calls_waiting >= together + lag else None

    def read(self, *, lag: int = 0) -> None:
        """Take the rows that left the device."""
        assert self.watcher is not None
        rows = self.instrument.tap.drain(lag=lag)
        self.watcher.take(rows, calls=self.watcher.calls_waiting - lag)
        self._read_at = time.monotonic()

    def _after(self, state: Any, logs: Any) -> None:
        watcher = self.watcher
        if watcher is not None:
            watcher.faults.call("keras host", self._timed, watcher, self._note, watcher, state, logs, default=None)
        self._call = None
        self.calls += 1
        self.batch += self._batches

    def _note(self, watcher: KerasWatcher, state: Any, logs: Any) -> None:
        call = self._call or watcher.began(epoch=self.epoch, batch=self.batch)
        if self._sampled:
            call.statistics.append(watcher.faults.call("keras sample", self._sample, default=_nothing))
        if self._before_sample is not None:
            before, self._before_sample = self._before_sample, None
            call.statistics.append(watcher.faults.call("keras sample", self._changes, before, state, default=_nothing))
        watcher.ran(call, logs)

    def epoch_began(self, epoch: int) -> None:
        """Count epochs and batches."""
        self.epoch, self.batch = epoch, 0
        # Looked up once: Keras collects them from all layers, which takes a millisecond for a hundred of these.
        faults = self.instrument.tap.faults
        self._trained = faults.call("keras sample", Trained, self.model, default=None) if self.model.built else None

    def epoch_ended(self, logs: dict[str, Any]) -> None:
        """Everything the epoch did is taken; validation metrics go to its last step."""
        if self.watcher is not None:
            self.watcher.faults.call("keras host", self.read, default=None)
            self.watcher.faults.call("keras host", self.watcher.epoch_ended, logs, default=None)

    def release(self, status: str = "finished", detail: str = "") -> dict[str, Any] | None:
        """Give the model its train function back and end the record; what the next session goes on from."""
        self.instrument.tap.faults.let_go("close", self._give_back)
        self.instrument.on_ready = None
        watcher = self.watcher
        if watcher is None:
            return None
        watcher.on_close = None
        watcher.faults.call("keras host", self.read, default=None)
        watcher.finish()
        self.watcher = None
        state = watcher.faults.call("keras host", watcher.state_dict, default=None)
        watcher.close(status, detail)
        if self.actions is not None:
            watcher.faults.let_go("close", self.actions.close)
        return state

    def _give_back(self) -> None:
        if self.model.train_function is self:
            self.model.train_function = self.plain


class Trained:
    """The variables of a model that are in training, in parts; each sample takes the next part.

    Args:
        model: The model, as it is trained now.
    """

    def __init__(self, model: keras.Model) -> None:
        self._variables = model.trainable_variables
        self._parts = parts([math.prod(variable.shape) for variable in self._variables])
        self._turn = 0

    def next_part(self) -> tuple[list[Any], list[int]]:
        """Variables, and their places among all."""
        places = self._parts[self._turn % len(self._parts)]
        self._turn += 1
        return [self._variables[place] for place in places], places


def _values(variables: Sequence[Any], places: Sequence[int], state: Any) -> list[Any]:
    """What the variables hold; on JAX inside `fit` in the state of the training."""
    return [v.value for v in variables] if state is None else [state[0][place] for place in places]


def _nothing() -> dict[str, Floats]:
    """What a sample that failed holds."""
    return {}


def _micro_steps(model: keras.Model) -> int:
    optimizer = getattr(model, "optimizer", None)
    return getattr(base_of(optimizer), "gradient_accumulation_steps", None) or 1


def _is_end_of_data(error: BaseException) -> bool:
    return isinstance(error, StopIteration) or type(error).__name__ == "OutOfRangeError"


def _unwrapped(model: keras.Model) -> Any:
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
    is_nnx_enabled = getattr(keras.config, "is_nnx_enabled", lambda: False)  # Keras 3.8 and later
    if keras.backend.backend() == "jax" and is_nnx_enabled():
        raise ModelError("Keras with NNX enabled cannot be watched: unset KERAS_NNX_ENABLED")
    if not isinstance(model, keras.Model):
        raise ModelError(f"'model' must be a Keras model: {type(model).__name__}")
