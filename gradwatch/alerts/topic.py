"""What a channel knows of one rule: what is new, what was told and still holds."""

from __future__ import annotations

import math

from gradwatch.alerts.message import Group, State
from gradwatch.records import SEVERITIES, Finding

#: Findings of a rule that wait in full for the next message; of further ones only the number is kept.
MOST_FRESH = 100
#: Told findings that are kept in full, and further ones of which only the resolution is awaited.
MOST_OPEN, MOST_AWAITED = 1_000, 10_000
#: Layers that are named in a message as data.
MOST_LAYERS = 50


class Topic:
    """The findings of one rule, from their opening to the message that says they are over.

    Args:
        rule: The rule.

    Attributes:
        since: When the oldest finding that is not told yet came (monotonic seconds), or when all were over.
        told_at: When the rule was last told.
        rank: The worst severity among what is not told yet, as an index into `SEVERITIES`; -1 for nothing.
        told_rank: The highest severity told, as an index into `SEVERITIES`; -1 before the first message.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.since, self.since_wall = math.inf, math.inf
        self.told_at, self.told_rank, self.rank = -math.inf, -1, -1
        self.fresh: dict[str, Finding] = {}
        self.open: dict[str, Finding] = {}
        self._beyond: set[str] = set()
        #: How many came when `fresh` was full, and whether some of those are awaited by nobody.
        self._more, self._lost = 0, False
        self._over: list[Finding] = []
        self._done: list[str] = []

    def add(self, finding: Finding, now: float, wall: float) -> None:
        """Take the latest state of a finding."""
        key = finding.id
        if key in self.fresh:
            self._note(finding, now, wall)
        elif key in self.open:
            self._follow(finding, now, wall)
        elif key in self._beyond:
            if not finding.is_open:
                self._beyond.discard(key)
        elif len(self.fresh) < MOST_FRESH or SEVERITIES.index(finding.severity) > self.rank:
            self._note(finding, now, wall)
        else:
            self._more += 1
            if finding.is_open:
                self._await(finding)

    def did(self, what: str) -> None:
        """Note what was done about it, for the next message."""
        self._done = [*self._done[-4:], what]

    @property
    def has_news(self) -> bool:
        """Whether something fires that was not told."""
        return bool(self.fresh)

    @property
    def is_over(self) -> bool:
        """Whether all that was told is resolved, and nobody was told yet."""
        return bool(self._over) and not (self.open or self.has_news or self._beyond or self._lost)

    @property
    def open_rank(self) -> int:
        """The worst severity among what was told and holds."""
        return max((SEVERITIES.index(finding.severity) for finding in self.open.values()), default=-1)

    def take_news(self, now: float, *, waited: bool) -> Group:
        """What fires and was not told; from now on it counts as told."""
        findings = list(self.fresh.values())
        state: State = "firing" if self._more or any(f.is_open for f in findings) else "passed"
        group = self._group(state, findings, more=self._more, waiting_since=self.since_wall if waited else None)
        self.told_rank = max(self.told_rank, self.rank)
        for finding in findings:
            if finding.is_open and len(self.open) < MOST_OPEN:
                self.open[finding.id] = finding
            elif finding.is_open:
                self._await(finding)
        self.fresh, self._more, self._over, self.rank = {}, 0, [], -1
        self.since, self.told_at = math.inf, now
        return group

    def take_reminder(self, now: float) -> Group:
        """What was told and still holds."""
        self.told_at = now
        return self._group("reminder", list(self.open.values()), more=len(self._beyond))

    def take_resolution(self) -> Group:
        """That all of it is over."""
        group = self._group("resolved", self._over)
        self._over, self.since = [], math.inf
        return group

    def _note(self, finding: Finding, now: float, wall: float) -> None:
        if not self.has_news:
            self.since, self.since_wall = now, wall
        self.fresh[finding.id] = finding
        self.rank = max(self.rank, SEVERITIES.index(finding.severity))

    def _await(self, finding: Finding) -> None:
        if len(self._beyond) < MOST_AWAITED:
            self._beyond.add(finding.id)
        else:
            self._lost = True

    def _follow(self, finding: Finding, now: float, wall: float) -> None:
        if not finding.is_open:
            del self.open[finding.id]
            self._over = [*self._over[-MOST_FRESH:], finding]
            if not self.has_news:
                self.since = now
        elif SEVERITIES.index(finding.severity) > SEVERITIES.index(self.open[finding.id].severity):
            del self.open[finding.id]
            self._note(finding, now, wall)
        else:
            self.open[finding.id] = finding

    def _group(
        self, state: State, findings: list[Finding], *, more: int = 0, waiting_since: float | None = None
    ) -> Group:
        lead = max(findings, key=lambda finding: SEVERITIES.index(finding.severity))
        layers = list(dict.fromkeys(layer for finding in (lead, *findings) for layer in finding.layers))
        done, self._done = tuple(self._done), []
        ends = [f.last_step if f.resolved_step is None else f.resolved_step for f in findings]
        over = state == "resolved"
        return Group(
            rule=self.rule,
            state=state,
            severity=lead.severity,
            count=len(findings) + more,
            first_step=min(finding.first_step for finding in findings),
            last_step=max(ends),
            layers=tuple(layers[:MOST_LAYERS]),
            layer_count=len(layers),
            message="" if over else lead.message,
            cause="" if over else lead.cause,
            advice=() if over else lead.advice,
            done=done,
            waiting_since=waiting_since,
            run=str(lead.evidence.get("run_name", "")),
        )
