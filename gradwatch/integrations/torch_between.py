"""Between the steps of a torch training: carries out what the policy decided where no gradient is pending.

A decision falls when a row is closed, which is when the next step begins. A learning-rate factor and a stop take effect
then. What changes weights waits until that step is over: its gradients belong to the old weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from gradwatch.actions.base import Due
from gradwatch.actions.policy import Policy
from gradwatch.actions.renewal import Stop
from gradwatch.backends.torch_actions import CannotApplyError, TorchActions
from gradwatch.integrations.torch_row import Row
from gradwatch.monitor import Monitor
from gradwatch.records import RENEWED


class BetweenSteps:
    """The between-step actions of a run.

    Args:
        model: The model.
        optimizers: Those given; others are added as they step.
        policy: Decides.
        monitor: Takes the records.
        stop: Ends the training, with what to say.
        begin: Told that the weights are others now, and what was usual before is not any more.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        policy: Policy,
        monitor: Monitor,
        *,
        stop: Callable[[str], None],
        begin: Callable[[], None],
    ) -> None:
        self._stop, self._begin = stop, begin
        self._model, self._policy, self._monitor = model, policy, monitor
        self._optimizers = list(map(_with_state, optimizers))
        self._due: Due | None = None
        self._is_renewed = self._is_closing = False
        #: Whether the state of the run is worth a snapshot; ranks that decide together agree on it.
        self.is_well: Callable[[], bool] = lambda: policy.is_well
        #: Whether nothing is carried out any more, because the other ranks would not do the same.
        self.is_off = False
        self._actions: TorchActions | None = None

    def start(self, run_dir: Path, *, is_dry: bool) -> None:
        """Check the actions and prepare for them.

        Args:
            run_dir: Directory of the run.
            is_dry: Record what would be done; do nothing.

        Raises:
            ConfigurationError: An action that this model or machine does not allow.
        """
        if self._policy.between and not is_dry:
            self._actions = TorchActions(self._model, self._optimizers, self._policy.between, run_dir)

    def take(self, due: Due, step: int) -> None:
        """An action is due before `step`.

        Raises:
            StopTraining: It is a `Stop`.
        """
        if self._is_closing or self.is_off:
            return
        if self._actions is None or due.action.only_rate:
            self._monitor.acted(due, step)
        elif isinstance(due.action, Stop):
            self._monitor.acted(due, step)
            self._stop(due.detail)
        elif not self._actions.can_apply(due):
            self._policy.pass_over(due)
        elif self._due is None:
            self._due = due

    def stepping(self, optimizer: Optimizer, row: Row) -> None:
        """An optimizer begins the step of this row."""
        if self._actions is None:
            return
        optimizer = _with_state(optimizer)
        if not any(optimizer is known for known in self._optimizers):
            self._optimizers.append(optimizer)
        self._actions.finish()
        if self._is_renewed:
            self._is_renewed = False
            row.metrics[RENEWED] = 1.0
        self._actions.begin(row.number)

    def stepped(self, row: Row) -> None:
        """It has: carry out what is due, or keep a good state."""
        if self._actions is None:
            return
        due, following = self._due, row.number + 1
        if due is None:
            self._actions.watch_over(following, is_well=self.is_well() and not row.skip_reason)
            return
        self._due = None
        try:
            self._actions.apply(due, following, lambda words: self._done(due, following, words))
        except CannotApplyError as error:
            self._monitor.could_not_act(due, following, str(error))

    def _done(self, due: Due, step: int, words: str) -> None:
        self._is_renewed = self._is_renewed or due.action.renews
        if due.action.begins_anew:
            self._begin()
        self._monitor.acted(due, step, detail=words)

    def close(self) -> None:
        """Let go of everything; nothing is carried out any more."""
        self._is_closing = True
        if self._actions is not None:
            self._actions.close()


def _with_state(optimizer: Optimizer) -> Optimizer:
    """The optimizer that has the state: in a `ZeroRedundancyOptimizer` that of this rank's parameters."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer
