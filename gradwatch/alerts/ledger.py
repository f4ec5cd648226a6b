"""Decides what is told when: grouping, cooldown, rate limit, quiet hours, reminders. Knows no thread and no clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from gradwatch.alerts.message import Group
from gradwatch.alerts.routing import Routing
from gradwatch.alerts.topic import Topic
from gradwatch.records import SEVERITIES, Finding

#: Rules (of a run) that are told apart; findings of further ones share a topic.
MOST_TOPICS = 200
#: Critical first messages that may pass the rate limit in a run.
MOST_URGENT = 50
_HOUR = 3600.0
_CRITICAL = SEVERITIES.index("critical")


class Ledger:
    """The findings that a channel has told, and those that wait.

    Its size is bounded, whatever comes: one topic per rule, and in each so many findings in full. Times are monotonic
    seconds but for `wall`, which is Unix time.

    Args:
        routing: The channel's settings.
    """

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._topics: dict[str, Topic] = {}
        self._sent: deque[float] = deque()
        self._urgent = 0

    def add(self, finding: Finding, *, now: float, wall: float) -> bool:
        """Take the latest state of a finding; whether there is something to tell."""
        topic = self._topic(finding)
        topic.add(finding, now, wall)
        return topic.has_news or topic.is_over

    def did(self, rule: str, what: str) -> None:
        """Note what was done about a rule, for the next message about it."""
        if topic := self._topics.get(rule):
            topic.did(what)

    def next_due(self, *, now: float, wall: float) -> float:
        """When `take` may have something; infinity while nothing waits."""
        quiet = self._routing.quiet_left(wall)
        first = min((self._due(topic, now, quiet) for topic in self._topics.values()), default=math.inf)
        return first if self._is_urgent(now, quiet) else max(first, self._free_at(now))

    def take(self, *, now: float, wall: float, final: bool = False) -> tuple[Group, ...]:
        """What is to be told now, in one message; empty for nothing.

        Args:
            now: The time.
            wall: The same as Unix time.
            final: The run ends: tell everything, whether it is due or not.
        """
        quiet = self._routing.quiet_left(wall)
        if not final and self.next_due(now=now, wall=wall) > now:
            return ()
        # What only waits for company travels with what is due.
        slack = self._routing.group_seconds
        chosen = [topic for topic in self._topics.values() if final or self._due(topic, now, quiet) <= now + slack]
        urgent = self._is_urgent(now, quiet)
        groups = [group for topic in chosen if (group := self._group_of(topic, now, final=final))]
        if not groups:
            return ()
        self._urgent += urgent and self._free_at(now) > now
        self._sent.append(now)
        return tuple(sorted(groups, key=_order))

    def _topic(self, finding: Finding) -> Topic:
        # Findings of a watchdog over many runs name the run: each run has its own cooldown there.
        key = f"{finding.evidence.get('run', '')}{finding.rule}"
        topic = self._topics.get(key)
        if topic is None:
            key, rule = (key, finding.rule) if len(self._topics) < MOST_TOPICS else ("", "other rules")
            topic = self._topics.setdefault(key, Topic(rule))
        return topic

    def _due(self, topic: Topic, now: float, quiet: float) -> float:
        """When the topic may be told, but for the rate limit."""
        routing = self._routing
        if topic.has_news:
            due = topic.since + routing.group_seconds
            if topic.rank <= topic.told_rank:
                due = max(due, topic.told_at + routing.cooldown)
            return max(due, now + quiet) if quiet and topic.rank < _CRITICAL else due
        if topic.is_over and routing.resolved:
            due = topic.since + routing.group_seconds
            return max(due, now + quiet) if quiet else due
        if routing.reminder is not None and topic.open_rank == _CRITICAL:
            return topic.told_at + routing.reminder
        return math.inf

    def _group_of(self, topic: Topic, now: float, *, final: bool) -> Group | None:
        if topic.has_news:
            return topic.take_news(now, waited=now - topic.since > 2 * self._routing.group_seconds + 1)
        if topic.is_over and self._routing.resolved:
            return topic.take_resolution()
        return None if final else topic.take_reminder(now)

    def _is_urgent(self, now: float, quiet: float) -> bool:
        """Whether a rule of which nobody has heard yet is critical and due."""
        if self._urgent >= MOST_URGENT:
            return False
        news = (t for t in self._topics.values() if t.has_news and t.told_rank < t.rank == _CRITICAL)
        return any(self._due(topic, now, quiet) <= now for topic in news)

    def _free_at(self, now: float) -> float:
        """When the rate limit allows the next message."""
        while self._sent and self._sent[0] <= now - _HOUR:
            self._sent.popleft()
        over = len(self._sent) - self._routing.per_hour
        return self._sent[over] + _HOUR if over >= 0 else now


def _order(group: Group) -> tuple[bool, int, int]:
    return group.state == "resolved", -SEVERITIES.index(group.severity), group.first_step


def rules_of(groups: Iterable[Group]) -> list[str]:
    """The rules of a message, each once."""
    return list(dict.fromkeys(group.rule for group in groups))
