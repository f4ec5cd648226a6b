"""Which between-step action is due: one a boundary, the mildest that may help, and no remedy twice that did not.

The rules, in order:

1. In the step, skips come before clips; clips act in the order of the list.
2. Between steps, one action is applied at a boundary, and while it is on trial no other is.
3. The gravest open finding comes first, and for it the first action that answers to it: in a plain list by how much
   they mend (`Rollback` before `DecayLR` before `ResetOptimizerState`, `Reinitialize`, `Restructure` and `Stop`), in a
   `Ladder` in its own order, the mildest first.
4. A trial ends when the finding has gone (`helped`), when its time is over (`no effect`), or early when things got
   worse. An action that failed `tries` times in a row against a rule is not tried against it again; a finding that
   comes back within as many steps after one helped counts as a failure too.
5. When nothing is left to try, or `GIVE_UP_AFTER` remedies in a row failed, the policy says so in the record and hands
   the run back; a `Stop` in the list ends the training then.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gradwatch.actions.base import Action, BetweenStepsAction, Due, InStepAction, RunState, keys_of
from gradwatch.actions.course import Course, take_rates
from gradwatch.actions.lr import DecayLR
from gradwatch.actions.presets import Ladder, chosen
from gradwatch.actions.probation import Probation
from gradwatch.actions.renewal import Stop
from gradwatch.actions.rollback import Rollback
from gradwatch.actions.trial import HELPED, WORSE, Trial
from gradwatch.errors import ConfigurationError
from gradwatch.records import SEVERITIES, ActionRecord, Finding

logger = logging.getLogger("gradwatch")
#: Remedies in a row without help after which the policy gives up.
GIVE_UP_AFTER = 8
#: Steps after giving up on a rule from which on a resolved finding of it means that remedies get a new chance.
NEW_CHANCE = 1000
#: Steps that a finding may stand, nothing being learnt, before a ladder says that it can do nothing about it.
HELPLESS = 300
#: What the record calls it.
GIVE_UP = "GiveUp"


class Policy:
    """Holds the actions of a run and decides which are due.

    Args:
        actions: A preset's name (`protect`, `repair`, `rebuild`), a list, or a `Ladder`.
        dry_run: Record what would be done, do nothing.

    Raises:
        ConfigurationError: Something that is no action, or two that exclude each other.
    """

    def __init__(self, actions: str | Sequence[Action], *, dry_run: bool = False) -> None:
        listed = chosen(actions)
        for action in listed:
            if not isinstance(action, Action):
                raise ConfigurationError.of("actions", "a list of gradwatch actions", action)
        in_step = [a for a in listed if isinstance(a, InStepAction)]
        self.in_step = sorted(in_step, key=lambda action: action.name != "SkipStep")
        self.between = [a for a in listed if isinstance(a, BetweenStepsAction)]
        self._is_ladder = isinstance(listed, Ladder)
        if not self._is_ladder:
            self.between.sort(key=lambda action: action.priority)
        self._keys = dict(zip(map(id, self.between), keys_of(self.between), strict=True))
        self.dry_run = dry_run
        self.state = RunState()
        self._course = Course()
        self._open: dict[str, Finding] = {}
        self._trial: Trial | None = None
        self._probation: Probation | None = None
        self._failed_in_row = self._fresh_from = 0
        self._given_up: dict[str, int] = {}
        #: Ids of findings of which it was said that nothing can be done about them.
        self._told: list[str] = []
        #: Rule to the action that helped against it last, when it was applied, and until when a relapse counts.
        self._cured: dict[str, tuple[str, int, int]] = {}
        #: Rule to the step since which it has come back again and again.
        self._chronic: dict[str, int] = {}
        self._news: list[ActionRecord] = []
        self._count = 0

    def decide(
        self, step: int, findings: Iterable[Finding], losses: Iterable[float] = (), rates: Sequence[float] = ()
    ) -> Due | None:
        """The action due before `step`.

        Args:
            step: The next step.
            findings: Those that opened, changed or resolved since the last call.
            losses: Of the steps since the last call.
            rates: Learning rates of these steps, without gradwatch's factor.
        """
        self._follow(step, findings)
        take_rates(step, rates, self.state)
        known = list(losses)
        # Losses of steps before the present weights say nothing about them.
        self._course.take(known[max(0, len(known) - max(0, step - self._fresh_from)) :], self.state)
        self._judge(step)
        if (undone := self._undone(step)) is not None or self._trial is not None:
            return undone
        for finding in self._gravest_first():
            self._say_helpless(finding, step)
            due, is_waiting = self._remedy(finding, step)
            if due is not None or is_waiting:
                return due
        return next((due for action in self.between if (due := action.recover(step, self.state))), None)

    def applied(self, due: Due, step: int, *, detail: str = "") -> ActionRecord:
        """Note that `due` was applied, and that `step` is the first to feel it; `detail` says more of what was done."""
        record = self._recorded(due, step, detail=detail)
        self._put_on_probation(due, record)
        if due.lr_factor is not None and not self.dry_run:
            self.state.lr_factor = due.lr_factor
        if due.finding is not None:
            self.state.recovery = None
            if not self.dry_run:
                self._trial = Trial(
                    key=self._keys[id(due.action)],
                    record=record,
                    deadline=step + due.action.within,
                    severity=due.finding.severity,
                    loss=self.state.loss,
                    renews=due.action.renews,
                )
        if due.action.renews and not self.dry_run:
            self._open.clear()
            self._course.renew()
            self._fresh_from = step
        if due.action.begins_anew and not self.dry_run:
            self._begin_anew(step)
        return record

    def _put_on_probation(self, due: Due, record: ActionRecord) -> None:
        key, present = self._keys[id(due.action)], self._probation
        if due.undo and present is not None:
            self.state.undone.append(key)
            self._news.append(dataclasses.replace(present.record, outcome=WORSE))
        if due.undo or (due.action.begins_anew and not due.action.is_undone):
            self._probation = None
        elif not self.dry_run and (found := Probation.of(due, key, record, self.state)):
            # New weights after new weights are held against the first ones.
            is_again = present is not None and present.key == key
            self._probation = dataclasses.replace(present, step=record.step) if present and is_again else found

    def _action(self, key: str) -> BetweenStepsAction:
        return next(action for action in self.between if self._keys[id(action)] == key)

    def _undone(self, step: int) -> Due | None:
        """What takes a remedy back that did worse in the long run."""
        probation = self._probation
        if probation is None:
            return None
        action = self._action(probation.key)
        passed = probation.is_passed(step, action, self.state)
        if passed:
            self._probation = None
        return probation.undone(action, self.state) if passed is False else None

    def _begin_anew(self, step: int) -> None:
        """Other weights: what milder remedies did for the old ones counts no longer."""
        self.state.began = step
        self._course.begin_anew(self.state)
        final = [self._keys[id(action)] for action in self.between if action.begins_anew]
        failures = self.state.failures.items()
        self.state.failures = {name: count for name, count in failures if name.partition(":")[0] in final}
        self._cured = {rule: cure for rule, cure in self._cured.items() if cure[0] in final}
        self._chronic = {}

    def failed(self, due: Due, step: int, why: str) -> ActionRecord:
        """Note that `due` could not be applied: it counts as a remedy that did not help."""
        record = dataclasses.replace(self._recorded(due, step), outcome=f"failed: {why}")
        if due.undo:
            self._probation = None
        if due.finding is not None:
            self._note_failure(self._keys[id(due.action)], due.finding.rule)
        return record

    @property
    def is_well(self) -> bool:
        """Whether no finding of concern is open and no remedy is on trial: a state worth going back to."""
        return self._trial is None and not any(finding.severity != "info" for finding in self._open.values())

    def pass_over(self, due: Due) -> None:
        """Note that `due` has nothing to do here, and need not be asked again for its rule."""
        if due.finding is not None:
            self.state.failures[f"{self._keys[id(due.action)]}:{due.finding.rule}"] = due.action.tries

    def take_news(self) -> list[ActionRecord]:
        """Outcomes and other records that came up since the last call."""
        news, self._news = self._news, []
        return news

    def _follow(self, step: int, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if finding.is_open:
                self._open[finding.id] = finding
                if finding.severity != "info":
                    self._note_relapse(finding.rule, step)
            elif self._open.pop(finding.id, None) and step - self._given_up.get(finding.rule, step) > NEW_CHANCE:
                self._forget_failures(finding.rule)
        if self._open:
            self.state.well_since = None
        elif self.state.well_since is None:
            self.state.well_since = step

    def _judge(self, step: int) -> None:
        """Close the trial when its verdict is known."""
        trial = self._trial
        if trial is None or not (outcome := trial.verdict(step, self._open.values(), self.state)):
            return
        self._trial = None
        self._news.append(dataclasses.replace(trial.record, outcome=outcome))
        if outcome == WORSE and self._probation is not None and self._probation.key == trial.key:
            self._probation = self._probation.shortened(self._action(trial.key))
        if outcome == HELPED:
            self._failed_in_row = 0
            applied = trial.record.step
            self._cured[trial.record.reason] = (trial.key, applied, step + trial.deadline - applied)
        else:
            self._note_failure(trial.key, trial.record.reason)

    def _note_relapse(self, rule: str, step: int) -> None:
        """A finding opened: what helped against its rule before did so for good, or not."""
        if rule not in self._cured:
            return
        key, applied, until = self._cured.pop(rule)
        if step <= until:
            self.state.failures[f"{key}:{rule}"] = self.state.failed(key, rule) + 1
            self._chronic.setdefault(rule, applied)
        else:
            self.state.failures.pop(f"{key}:{rule}", None)
            self._chronic.pop(rule, None)

    def _forget_failures(self, rule: str) -> None:
        del self._given_up[rule]
        failures = self.state.failures.items()
        self.state.failures = {name: count for name, count in failures if name.partition(":")[2] != rule}

    def _note_failure(self, key: str, rule: str) -> None:
        self._failed_in_row += 1
        self.state.failures[f"{key}:{rule}"] = self.state.failed(key, rule) + 1

    def _gravest_first(self) -> list[Finding]:
        def order(finding: Finding) -> tuple[int, bool, int, str]:
            return -SEVERITIES.index(finding.severity), finding.rule != "nonfinite", finding.first_step, finding.id

        return sorted(self._open.values(), key=order)

    def _remedy(self, finding: Finding, step: int) -> tuple[Due | None, bool]:
        """What is due for a finding; and whether nothing else may be done before its remedy."""
        if finding.rule in self._given_up or not any(action.answers(finding) for action in self.between):
            return None, False
        if self._failed_in_row >= GIVE_UP_AFTER:
            return self._give_up(finding, step, f"{GIVE_UP_AFTER} remedies in a row did not help"), False
        may_help = False
        for action in self._answering(finding):
            may_help = may_help or not isinstance(action, Stop)
            if isinstance(action, DecayLR) and self.state.is_wrecked and self._rolls_back(finding):
                continue
            if self._is_time(action, finding, step) and (due := action.respond(finding, step, self.state)):
                return due, False
            is_young = step - finding.first_step < HELPLESS
            if finding.evidence.get("cause_id", "") in action.cures and not self.state.learns and is_young:
                return None, True  # what takes the cause away waits to be sure
        if not may_help and any(key.endswith(f":{finding.rule}") for key in self.state.failures):
            return self._give_up(finding, step, "no remedy is left"), False
        return None, False

    def _say_helpless(self, finding: Finding, step: int) -> None:
        """Of a ladder somebody expects that it does something: say once where it cannot."""
        is_long = step - finding.first_step >= HELPLESS and finding.severity != "info"
        if self._is_ladder and is_long and not self.state.learns and finding.id not in self._told:
            self._told.append(finding.id)
            self._hand_back(finding, step, f"nothing here takes the cause of {finding.rule} away")

    def _rolls_back(self, finding: Finding) -> bool:
        """Whether there is a `Rollback` for it, without which a smaller rate is better than nothing."""
        return any(isinstance(action, Rollback) for action in self._answering(finding))

    def _answering(self, finding: Finding) -> Iterator[BetweenStepsAction]:
        """The actions that may still be applied to a finding, now or later: first those beyond the last that failed."""
        is_spent = [self.state.failed(self._keys[id(a)], finding.rule) >= a.tries for a in self.between]
        rung = max((place for place, spent in enumerate(is_spent) if spent), default=-1)
        cause = finding.evidence.get("cause_id", "")

        def turn(place: int) -> tuple[bool, bool, bool, bool, int]:
            action = self.between[place]
            # A second draw of the same weights comes after what was not tried yet.
            is_again = action.begins_anew and self._keys[id(action)] in self.state.times
            return isinstance(action, Stop), is_again, cause not in action.cures, place < rung, place

        for place in sorted(range(len(self.between)), key=turn):
            action = self.between[place]
            times = self.state.times.get(self._keys[id(action)], 0)
            within_limit = action.max_times is None or times < action.max_times
            is_barred = self._keys[id(action)] in self.state.undone
            if action.answers(finding) and within_limit and not is_spent[place] and not is_barred:
                yield action

    def _is_time(self, action: BetweenStepsAction, finding: Finding, step: int) -> bool:
        last = self.state.last_applied.get(self._keys[id(action)])
        is_lost = finding.severity == "critical" or math.isinf(self.state.loss)
        confirm = action.confirm // 3 if is_lost else action.confirm
        since = min(finding.first_step, self._chronic.get(finding.rule, finding.first_step))
        return (last is None or step - last >= action.cooldown) and step - since >= confirm

    def _give_up(self, finding: Finding, step: int, why: str) -> Due | None:
        """Say that nothing more will be done about a rule; stop if a `Stop` is there for it."""
        self._given_up[finding.rule] = step
        tried = ", ".join(key.partition(":")[0] for key in self.state.failures if key.endswith(f":{finding.rule}"))
        detail = f"gave up on {finding.rule}: {why} (tried: {tried or 'none'})"
        stop = next((a for a in self.between if isinstance(a, Stop) and finding.rule in a.on), None)
        if stop is not None:
            return Due(stop, f"{detail}; training stopped", layers=finding.layers, finding=finding)
        self._hand_back(finding, step, detail)
        return None

    def _hand_back(self, finding: Finding, step: int, detail: str) -> None:
        logger.warning("gradwatch: %s; the run is handed back: %s", detail, finding.message)
        self._count += 1
        self._news.append(
            ActionRecord(
                id=f"{GIVE_UP}-{step}-{self._count}",
                step=step,
                action=GIVE_UP,
                layers=finding.layers,
                detail=detail,
                reason=finding.rule,
                finding=finding.id,
                dry_run=self.dry_run,
            )
        )

    def _recorded(self, due: Due, step: int, *, detail: str = "") -> ActionRecord:
        key = self._keys[id(due.action)]
        if due.finding is not None:
            self.state.last_applied[key] = step
            self.state.times[key] = self.state.times.get(key, 0) + 1
        self._count += 1
        return ActionRecord(
            id=f"{key}-{step}-{self._count}",
            step=step,
            action=due.action.name,
            layers=due.layers,
            detail=f"{due.detail}: {detail}" if detail else due.detail,
            reason=due.finding.rule if due.finding else "",
            finding=due.finding.id if due.finding else "",
            before=due.before,
            after=due.after,
            dry_run=self.dry_run,
        )

    def config(self) -> list[dict[str, Any]]:
        """The actions as JSON."""
        return [{"action": action.name, **action.config()} for action in [*self.in_step, *self.between]]

    def state_dict(self) -> dict[str, Any]:
        """State as JSON types."""
        return {
            "run": dataclasses.asdict(self.state),
            "course": self._course.state_dict(),
            "open": [finding.to_json() for finding in self._open.values()],
            "trial": self._trial.to_json() if self._trial else None,
            "probation": self._probation.to_json() if self._probation else None,
            "failed_in_row": self._failed_in_row,
            "fresh_from": self._fresh_from,
            "given_up": self._given_up,
            "told": self._told,
            "cured": self._cured,
            "chronic": self._chronic,
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        run = dict(state["run"])
        run["recovery"] = tuple(run["recovery"]) if run["recovery"] else None
        self.state = RunState(**run)
        self._course.load_state_dict(state["course"])
        self._open = {data["id"]: Finding.from_json(data) for data in state["open"]}
        self._trial = Trial.from_json(state["trial"]) if state["trial"] else None
        self._probation = Probation.from_json(state["probation"]) if state["probation"] else None
        self._failed_in_row, self._fresh_from = state["failed_in_row"], state["fresh_from"]
        self._given_up, self._told = dict(state["given_up"]), list(state["told"])
        self._cured = {rule: (key, applied, until) for rule, (key, applied, until) in state["cured"].items()}
        self._chronic = dict(state["chronic"])
        self._count = state["count"]
