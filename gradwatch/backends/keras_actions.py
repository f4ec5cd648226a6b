"""Applies between-step actions to a Keras training."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from gradwatch.actions.base import BetweenStepsAction, Due
from gradwatch.backends.keras_fill import fresh_value, owners_of
from gradwatch.backends.keras_model import Columns
from gradwatch.backends.keras_values import Array, Values
from gradwatch.backends.room import require_room
from gradwatch.errors import ConfigurationError


class CannotApplyError(Exception):
    """An action that cannot be applied here; the message says why."""


@dataclass
class _Snapshot:
    step: int
    values: list[Array] | Path


class KerasActions:
    """Carries out what the policy decides, at the boundary between two steps.

    Args:
        model: The model.
        columns: Its variables.
        optimizers: Its optimizers.
        actions: The between-step actions of the run, to be checked now rather than when they are needed.
        run_dir: Where snapshots on disk go.

    Raises:
        ConfigurationError: An action that Keras models do not allow.
    """

    def __init__(
        self,
        model: keras.Model,
        columns: Columns,
        *,
        optimizers: Sequence[Any],
        actions: Sequence[BetweenStepsAction],
        run_dir: Path,
    ) -> None:
        self._model, self._columns, self._optimizers = model, columns, list(optimizers)
        self._rng = np.random.default_rng()
        #: Whether the weights are in the model's variables, or JAX's state: not in a stateless loop of the user's own.
        self.are_weights_here = True
        listed: list[Any] = list(actions)
        self._rollback = next((action for action in listed if action.name == "Rollback"), None)
        on_disk = self._rollback is not None and self._rollback.where == "disk"
        self._directory = run_dir if on_disk else None
        self._folder: Path | None = None
        self._given_up: list[Array] | None = None
        self._ring: deque[_Snapshot] = deque(maxlen=self._rollback.keep if self._rollback else 1)
        if any(action.name == "Restructure" for action in actions):
            raise ConfigurationError("'Restructure' changes PyTorch models only, not Keras models")
        if self._rollback is not None:
            require_room(self._rollback.keep, self._size(), self._directory)

    def _size(self) -> int:
        """Bytes of one snapshot; an optimizer that is not built yet is taken to hold two numbers for each weight."""
        built = sum(map(_bytes, Values(self._model, self._optimizers).everything()))
        coming = sum(2 for optimizer in self._optimizers if not optimizer.built)
        return built + coming * sum(map(_bytes, self._model.trainable_variables))

    def values(self, state: Any) -> Values:
        """Access to all variables; `state` is JAX's."""
        return Values(self._model, self._optimizers, state)

    def watch_over(self, step: int, state: Any, *, is_well: bool) -> None:
        """Take a snapshot before `step` when it is time and all is well."""
        if (
            self._rollback is None
            or not self.are_weights_here
            or (self._ring and (step % self._rollback.every or not is_well))
        ):
            return
        values = self.values(state)
        found = [values.read(variable) for variable in values.everything()]
        if len(self._ring) == self._ring.maxlen:
            _delete(self._ring.popleft())
        if self._directory is None:
            self._ring.append(_Snapshot(step, found))
            return
        if self._folder is None:  # only its owner may read the weights in it
            self._folder = Path(tempfile.mkdtemp(prefix="snapshots-", dir=self._directory))
        np.savez(self._folder / f"{step}.npz", *found)
        self._ring.append(_Snapshot(step, self._folder / f"{step}.npz"))

    def apply(self, due: Due, state: Any) -> tuple[Any, str]:
        """Carry out an action.

        Returns:
            JAX's state, changed; and what was done, in words.

        Raises:
            CannotApplyError: It cannot be done.
        """
        action: Any = due.action
        values, done = self.values(state), ""
        if not (self.are_weights_here or action.only_rate or action.name == "Stop"):
            raise CannotApplyError("the weights and the optimizer's state are in variables of the loop")
        if due.undo and not action.only_rate:
            done = self._put_back(values)
        elif action.name == "Rollback":
            done = self._roll_back(due, values)
        elif action.name == "ResetOptimizerState":
            done = f"state of {values.forget(self._chosen(due.layers))} variables"
            if not due.layers:
                values.restart_counts()
        elif action.name == "Reinitialize":
            self._given_up = self._given_up or [values.read(variable) for variable in values.everything()]
            done = self._initialize(due.layers, action.scheme, values)
        return values.state, done

    def close(self) -> None:
        """Delete snapshots on disk."""
        self._ring.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _chosen(self, layers: Sequence[str]) -> list[Any]:
        described = zip(self._columns.variables, self._columns.parameters, strict=True)
        return [variable for variable, parameter in described if not layers or parameter.layer in layers]

    def _initialize(self, layers: Sequence[str], scheme: str, values: Values) -> str:
        owners = owners_of(self._model)
        chosen = [variable for variable in self._chosen(layers) if variable.trainable]
        for variable in chosen:
            column = self._columns.of(variable)
            assert column is not None
            parameter = self._columns.parameters[column]
            owner = owners.get(id(variable))
            values.write(variable, fresh_value(variable, parameter, owner, scheme=scheme, rng=self._rng))
        values.forget(chosen)
        if not layers:
            values.restart_counts()
        return f"{len(chosen)} variables"

    def _put_back(self, values: Values) -> str:
        if self._given_up is None:
            raise CannotApplyError("the weights before were not kept")
        for variable, value in zip(values.everything(), self._given_up, strict=True):
            values.write(variable, value)
        self._given_up = None
        return "the weights before are back"

    def _roll_back(self, due: Due, values: Values) -> str:
        if not self._ring:
            raise CannotApplyError("no snapshot was taken before the run fell sick")
        good = sum(snapshot.step <= (due.until_step or 0) for snapshot in self._ring)
        place = max(0, good - 1 - due.backs)
        while len(self._ring) > place + 1:
            _delete(self._ring.pop())
        snapshot = self._ring[place]
        kept = snapshot.values if isinstance(snapshot.values, list) else list(np.load(snapshot.values).values())
        for variable, value in zip(values.everything(), kept, strict=True):
            values.write(variable, value)
        return f"the state before step {snapshot.step}"


def _delete(snapshot: _Snapshot) -> None:
    if isinstance(snapshot.values, Path):
        snapshot.values.unlink(missing_ok=True)


def _bytes(variable: Any) -> int:
    bits = re.search(r"\d+", str(variable.dtype))
    return int(math.prod(variable.shape)) * (int(bits[0]) // 8 if bits else 1)
