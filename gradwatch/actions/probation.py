"""What a remedy has to show in the long run: new weights or a higher rate that do worse than the old are taken back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from gradwatch.actions.base import BetweenStepsAction, Due, RunState
from gradwatch.records import ActionRecord

#: A loss that has risen by this share of what it was has ended up worse.
LOST = 0.5
#: New weights that learn get this many times as long as those that do not.
PATIENCE = 5


@dataclass(frozen=True)
class Probation:
    """A remedy that is taken back unless the loss comes down again.

    A false alarm must not cost what a network knew. Weights that knew nothing have a loss that new ones soon reach.

    Args:
        key: The action's name, with a number where a list holds several of a class.
        record: The record of its application.
        step: The first step that felt it.
        loss: The loss then.
        before: gradwatch's factor on the learning rate until then.
        is_over: Whether it did so badly that it is not waited for.
    """

    key: str
    record: ActionRecord
    step: int
    loss: float
    before: float
    is_over: bool = False

    @classmethod
    def of(cls, due: Due, key: str, record: ActionRecord, state: RunState) -> Self | None:
        """For an action that was applied; None for one that has nothing to lose."""
        if due.finding is None or not due.action.is_undone or not math.isfinite(state.loss):
            return None
        return cls(key, record, record.step, state.loss, state.lr_factor)

    def is_passed(self, step: int, action: BetweenStepsAction, state: RunState) -> bool | None:
        """Whether the remedy stays; None while it is too early to say."""
        age = step - self.step
        if self.is_over:
            return False
        if age < action.within or (state.learns and age < PATIENCE * action.within):
            return None
        return state.loss <= self.loss + LOST * abs(self.loss)

    def shortened(self, action: BetweenStepsAction) -> Self:
        """After a trial that found things worse: a rate is taken back at once, weights may need time."""
        return dataclasses.replace(self, is_over=action.only_rate)

    def undone(self, action: BetweenStepsAction, state: RunState) -> Due:
        """What takes the remedy back."""
        detail = f"taken back: the loss is {state.loss:.4g} and was {self.loss:.4g} before"
        return Due(action, detail, before=state.lr_factor, after=self.before, lr_factor=self.before, undo=True)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return {**dataclasses.asdict(self), "record": self.record.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**data, "record": ActionRecord.from_json(data["record"])})
