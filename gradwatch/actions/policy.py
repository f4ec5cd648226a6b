"""Which between-step action is due: one a boundary, in order of priority, within cooldowns and limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradwatch.actions.base import Action, BetweenStepsAction, Due, InStepAction, RunState
from gradwatch.errors import ConfigurationError
from gradwatch.records import SEVERITIES, ActionRecord, Finding


class Policy:
    """Holds the actions of a run and decides which are due.

    Args:
        actions: The user's list. In-step actions run in the order given, skips first.
        dry_run: Record what would be done, do nothing.
    """

    def __init__(self, actions: Sequence[Action], *, dry_run: bool = False) -> None:
        for action in actions:
            if not isinstance(action, Action):
                raise ConfigurationError.of("actions", "a list of gradwatch actions", action)
        in_step = [a for a in actions if isinstance(a, InStepAction)]
        self.in_step = sorted(in_step, key=lambda action: action.name != "SkipStep")
        self.between = sorted(
            (a for a in actions if isinstance(a, BetweenStepsAction)), key=lambda action: action.priority
        )
        self.dry_run = dry_run
        self.state = RunState()
        self._open: dict[str, Finding] = {}
        self._count = 0

    def decide(self, step: int, findings: Iterable[Finding]) -> Due | None:
        """The action due before `step`, after these findings opened, changed or resolved."""
        for finding in findings:
            if finding.is_open:
                self._open[finding.id] = finding
            else:
                self._open.pop(finding.id, None)
        for action in self.between:
            if not self._allowed(action, step):
                continue
            for finding in self._open.values():
                if self._calls_for(finding, action) and (due := action.respond(finding, step, self.state)):
                    return due
        for action in self.between:
            if due := action.recover(step, self.state):
                return due
        return None

    def applied(self, due: Due, step: int) -> ActionRecord:
        """Note that `due` was applied before `step`."""
        name = due.action.name
        self.state.last_applied[name] = step
        self.state.times[name] = self.state.times.get(name, 0) + 1
        self._count += 1
        return ActionRecord(
            id=f"{name}-{step}-{self._count}",
            step=step,
            action=name,
            layers=due.layers,
            detail=due.detail,
            reason=due.finding.rule if due.finding else "",
            finding=due.finding.id if due.finding else "",
            before=due.before,
            after=due.after,
            dry_run=self.dry_run,
        )

    def _allowed(self, action: BetweenStepsAction, step: int) -> bool:
        times, last = self.state.times.get(action.name, 0), self.state.last_applied.get(action.name)
        within_limit = action.max_times is None or times < action.max_times
        return within_limit and (last is None or step - last >= action.cooldown)

    def _calls_for(self, finding: Finding, action: BetweenStepsAction) -> bool:
        last = self.state.last_applied.get(action.name)
        severe = SEVERITIES.index(finding.severity) >= SEVERITIES.index(action.min_severity)
        return severe and finding.rule in action.on and (last is None or finding.last_step >= last)

    def config(self) -> list[dict[str, Any]]:
        """The actions as JSON."""
        return [{"action": action.name, **action.config()} for action in [*self.in_step, *self.between]]

    def state_dict(self) -> dict[str, Any]:
        """State as JSON types."""
        return {
            **dataclasses.asdict(self.state),
            "open": [finding.to_json() for finding in self._open.values()],
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.state = RunState(state["lr_factor"], dict(state["last_applied"]), dict(state["times"]))
        self._open = {data["id"]: Finding.from_json(data) for data in state["open"]}
        self._count = state["count"]
