"""Applies between-step actions to a torch model and its optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.actions.base import BetweenStepsAction, Due
from gradwatch.actions.renewal import Reinitialize, ResetOptimizerState, Restructure
from gradwatch.actions.rollback import Rollback
from gradwatch.backends.torch_snapshots import Snapshots
from gradwatch.errors import ConfigurationError
from gradwatch.remedies import Change, insert_norm, mend_output, replace_activation
from gradwatch.remedies.initialization import fill
from gradwatch.remedies.network import NORMS, layers_of, require_plain
from gradwatch.remedies.structure import is_output_shut, is_saturating

#: Called when an action was applied: what was done, in words.
Done = Callable[[str], None]
#: A forward pass over a batch.
Forward = Callable[[], Any]


class CannotApplyError(Exception):
    """An action that cannot be applied here; the message says why."""


class TorchActions:
    """Carries out what the policy decides, at the boundary between two steps.

    Args:
        model: The model.
        optimizers: A list that grows as optimizers turn up.
        actions: The between-step actions of the run, to be checked now rather than when they are needed.
        run_dir: Where snapshots on disk go.

    Raises:
        ConfigurationError: An action that this model or machine does not allow.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        actions: Sequence[BetweenStepsAction],
        run_dir: Path,
    ) -> None:
        self._model, self._optimizers = model, optimizers
        self._rollback = next((action for action in actions if isinstance(action, Rollback)), None)
        self._snapshots: Snapshots | None = None
        self._given_up: Snapshots | None = None
        self._filled = 1
        self._waiting: _AtNextForward | None = None
        for action in actions:
            _check(action, model)
        if self._rollback is not None:
            directory = run_dir / "snapshots" if self._rollback.where == "disk" else None
            self._snapshots = Snapshots(model, optimizers, keep=self._rollback.keep, directory=directory)

    def begin(self, step: int) -> None:
        """Take the first snapshot, before `step`."""
        if self._snapshots is not None and not len(self._snapshots):
            self._snapshots.take(step)

    def watch_over(self, step: int, *, is_well: bool) -> None:
        """Take a snapshot before `step` when it is time and all is well."""
        if self._rollback is None or self._snapshots is None or self._waiting is not None:
            return
        if step % self._rollback.every == 0 and is_well:
            self._snapshots.take(step)

    def can_apply(self, due: Due) -> bool:
        """Whether the action has anything to do in this model."""
        if isinstance(due.action, Restructure) and due.action.changes == ("output",):
            return is_output_shut(self._model)
        return True

    def apply(self, due: Due, step: int, done: Done) -> None:
        """Carry out an action; `done` is called when it is, now or right before the next forward pass.

        Args:
            due: The action.
            step: The first step that will feel it.
            done: Takes what was done, in words.

        Raises:
            CannotApplyError: It cannot be done.
        """
        action = due.action
        if due.undo:
            self._put_back(self._kept(step, done))
        elif isinstance(action, Rollback):
            done(self._roll_back(due))
        elif isinstance(action, ResetOptimizerState):
            done(self._forget(due.layers))
        elif isinstance(action, Restructure):
            self._restructure(action, self._kept(step, done))
        elif isinstance(action, Reinitialize):
            self._give_up_weights(step)
            self._initialize(action.scheme, due.layers, self._kept(step, done))
        else:
            done("")

    def finish(self) -> None:
        """Carry out now what waits for a forward pass that did not come."""
        if self._waiting is not None:
            self._waiting.now()

    def close(self) -> None:
        """Let go of hooks and snapshots."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None
        if self._snapshots is not None:
            self._snapshots.close()

    def _kept(self, step: int, done: Done) -> Done:
        """`done`, after which the new weights are what a rollback goes back to."""

        def renewed(words: str) -> None:
            if self._snapshots is not None:
                self._snapshots.clear()
                self._snapshots.take(step)
            done(words)

        return renewed

    def _give_up_weights(self, step: int) -> None:
        """Keep what new weights are measured against: the first weights that were given up."""
        if self._given_up is None:
            try:
                self._given_up = Snapshots(self._model, self._optimizers, keep=1)
            except ConfigurationError as error:
                raise CannotApplyError(f"the weights could not be kept meanwhile: {error}") from None
            self._given_up.take(step)

    def _put_back(self, done: Done) -> None:
        if self._given_up is None:
            raise CannotApplyError("the weights before were not kept")
        step = self._given_up.restore(0)
        self._given_up = None
        done(f"the weights before step {step}")

    def _roll_back(self, due: Due) -> str:
        assert self._snapshots is not None
        try:
            step = self._snapshots.restore(due.until_step or 0, backs=due.backs)
        except LookupError as error:
            raise CannotApplyError(str(error)) from None
        return f"the state before step {step}"

    def _forget(self, layers: Sequence[str]) -> str:
        chosen = {id(p) for p in self._parameters_of(layers)}
        cleared = 0
        for optimizer in self._optimizers:
            for parameter, state in list(optimizer.state.items()):
                if layers and id(parameter) not in chosen:
                    continue
                cleared += 1
                if any(group.get("capturable") for group in optimizer.param_groups):
                    # A captured graph goes on using these tensors.
                    for value in state.values():
                        if isinstance(value, Tensor):
                            value.zero_()
                else:
                    del optimizer.state[parameter]
        return f"state of {cleared} parameters"

    def _parameters_of(self, layers: Sequence[str]) -> list[nn.Parameter]:
        modules = {name.replace("_orig_mod.", ""): module for name, module in self._model.named_modules()}
        return [p for name in layers if name in modules for p in modules[name].parameters(recurse=False)]

    def _restructure(self, action: Restructure, done: Done) -> None:
        self._given_up = None  # they have no place in another architecture
        made = ((kind, _CHANGES[kind](self._model, action, self._optimizers)) for kind in action.changes)
        kind, changes = next(((kind, changes) for kind, changes in made if changes), ("", []))
        if not changes:
            raise CannotApplyError("there is nothing left to change in this architecture")
        where = _in_words(changes)
        if kind == "output":
            self._forget(())
            done(where)
        else:
            self._initialize("auto", (), lambda fitted: done(f"{where}; {fitted}"))

    def _initialize(self, scheme: str, layers: Sequence[str], done: Done) -> None:
        """Initialise now, or with the inputs of the next training batch where the scheme looks at them."""
        if scheme in ("auto", "data", "lsuv") and not _is_distributed() and _is_called_whole(self._model):
            self._waiting = _AtNextForward(self._model, lambda forward: self._fill(scheme, layers, forward, done))
        else:
            self._fill(scheme, layers, None, done)

    def _fill(self, scheme: str, layers: Sequence[str], forward: Forward | None, done: Done) -> None:
        self._waiting = None
        known = {layer.name for layer in layers_of(self._model)}
        chosen = [name for name in layers if name in known] or None
        scheme = scheme if forward is not None or scheme not in ("data", "lsuv") else "auto"
        devices = sorted({p.device.index or 0 for p in self._model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((torch.initial_seed() + self._filled) % 2**62)
            changes = fill(self._model, scheme, layers=chosen, forward=forward)
        self._filled += 1
        if _is_distributed():
            for parameter in self._model.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        self._forget(chosen or [])
        done(_in_words(changes))


class _AtNextForward:
    """Calls back once, right before the model sees the next training batch, with a function that repeats that pass."""

    def __init__(self, model: nn.Module, call: Callable[[Forward | None], None]) -> None:
        self._call = call
        self._handle = model.register_forward_pre_hook(_Hook(self), with_kwargs=True)

    def now(self, forward: Forward | None = None) -> None:
        """Call back now."""
        self.remove()
        self._call(forward)

    def remove(self) -> None:
        """Do not call any more."""
        self._handle.remove()


class _Hook:
    """The hook itself; inert in copies and pickles of the model."""

    def __init__(self, waiting: _AtNextForward | None = None) -> None:
        self._waiting = waiting

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._waiting is not None and model.training and torch.is_grad_enabled():
            copies = {key: _copied(value) for key, value in kwargs.items()}
            self._waiting.now(lambda: model.forward(*map(_copied, args), **copies))

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _copied(value: Any) -> Any:
    """A model may change its inputs in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _in_words(changes: Sequence[Change]) -> str:
    where = "; ".join(map(str, changes[:3]))
    return f"{where}; ... ({len(changes)} changes)" if len(changes) > 3 else where


def _change_activation(model: nn.Module, action: Restructure, optimizers: Sequence[Optimizer]) -> list[Change]:
    hidden = [layer.activation for layer in layers_of(model) if not layer.is_output and layer.activation is not None]
    sick = {type(module) for module in hidden if is_saturating(module)}
    return replace_activation(model, tuple(sick), action.replacement) if sick else []


def _change_norm(model: nn.Module, action: Restructure, optimizers: Sequence[Optimizer]) -> list[Change]:
    if any(isinstance(module, NORMS) for module in model.modules()) or not optimizers:
        return []
    try:
        return insert_norm(model, optimizer=optimizers[0])
    except ConfigurationError:
        return []


_CHANGES: dict[str, Callable[[nn.Module, Restructure, Sequence[Optimizer]], list[Change]]] = {
    "output": lambda model, action, optimizers: mend_output(model),
    "activation": _change_activation,
    "norm": _change_norm,
}


def _check(action: BetweenStepsAction, model: nn.Module) -> None:
    """Refuse at once what could only fail later."""
    if isinstance(action, Restructure):
        require_plain(model, "Restructure")
    if isinstance(action, Reinitialize) and not layers_of(model) and action.scheme != "default":
        raise ConfigurationError(
            f"Reinitialize(scheme={action.scheme!r}) finds no linear, convolutional or recurrent layer in "
            f"{type(model).__name__}"
        )


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_called_whole(model: nn.Module) -> bool:
    """Whether the loop calls the model itself, in Python."""
    return not isinstance(model, (nn.ModuleList, nn.ModuleDict)) and type(model).__name__ != "OptimizedModule"
