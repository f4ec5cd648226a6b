"""Which findings a channel tells, and how often."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import SEVERITIES, Severity

_DAY = 24 * 60


class RoutingOptions(TypedDict, total=False):
    """The keyword arguments of `Routing`."""

    min_severity: Severity
    rules: Sequence[str] | None
    group_seconds: float
    cooldown: float
    per_hour: int
    reminder: float | None
    quiet_hours: tuple[str, str] | None
    resolved: bool
    finished: bool
    stall: float | None
    stall_seconds: float
    close_seconds: float


@dataclass(frozen=True)
class Routing:
    """What every channel can be told.

    Args:
        min_severity: Tell only of findings at least so severe.
        rules: Tell only of these rules; all by default.
        group_seconds: Wait so long for more before sending, so that forty layers make one message.
        cooldown: Seconds between two messages about one rule; a rise in severity does not wait.
        per_hour: At most so many messages an hour; the rest waits and comes as one. The first critical message about a
            rule does not wait.
        reminder: Seconds after which an open critical finding is told again; None never does.
        quiet_hours: Such as `("22:00", "07:00")`, local time: what is not critical waits until they are over.
        resolved: Tell also when it is over.
        finished: Tell also when the training ends well.
        stall: Tell when no step ends for so many times the median step time; None never does.
        stall_seconds: ... but not before so many seconds, nor before twice the longest pause so far, so that a
            validation is no stall.
        close_seconds: How long `close` waits for the last message.
    """

    min_severity: Severity = "warning"
    rules: Sequence[str] | None = None
    group_seconds: float = 5.0
    cooldown: float = 900.0
    per_hour: int = 20
    reminder: float | None = 4 * 3600.0
    quiet_hours: tuple[str, str] | None = None
    resolved: bool = True
    finished: bool = False
    stall: float | None = 10.0
    stall_seconds: float = 60.0
    close_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.min_severity not in SEVERITIES:
            raise UnknownNameError.among("severity", self.min_severity, SEVERITIES)
        if isinstance(self.rules, str):
            raise ConfigurationError.of("rules", "a list of rules", self.rules)
        for name in ("group_seconds", "cooldown", "stall_seconds", "close_seconds"):
            _require_number(name, getattr(self, name), above=False)
        for name in ("reminder", "stall"):
            if getattr(self, name) is not None:
                _require_number(name, getattr(self, name), above=True)
        if isinstance(self.per_hour, bool) or not isinstance(self.per_hour, int) or self.per_hour < 1:
            raise ConfigurationError.of("per_hour", "an integer >= 1", self.per_hour)
        object.__setattr__(self, "_quiet", _quiet_minutes(self.quiet_hours))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """From keyword arguments; an unknown one gets an error that names the closest."""
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise UnknownNameError.among("setting of a channel", name, cls.__dataclass_fields__)
        return cls(**given)

    def wants(self, rule: str, severity: Severity) -> bool:
        """Whether the channel tells of such a finding."""
        severe = SEVERITIES.index(severity) >= SEVERITIES.index(self.min_severity)
        return severe and (self.rules is None or rule in self.rules)

    def quiet_left(self, wall: float) -> float:
        """Seconds until the quiet hours end; 0 outside them.

        Args:
            wall: Unix time.
        """
        quiet: tuple[int, int] | None = getattr(self, "_quiet", None)
        if quiet is None:
            return 0.0
        start, end = quiet
        now = time.localtime(wall)
        minute = now.tm_hour * 60 + now.tm_min
        if (minute - start) % _DAY >= (end - start) % _DAY:
            return 0.0
        return (end - minute) % _DAY * 60.0 - now.tm_sec


def _require_number(name: str, value: object, *, above: bool) -> None:
    rule = "> 0" if above else ">= 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError.of(name, f"a number {rule}", value)
    if value < 0 or (above and value == 0):
        raise ConfigurationError.of(name, rule, value)


def _quiet_minutes(hours: tuple[str, str] | None) -> tuple[int, int] | None:
    if hours is None:
        return None
    try:
        start, end = (time.strptime(text, "%H:%M") for text in hours)
    except (TypeError, ValueError):
        raise ConfigurationError.of("quiet_hours", 'two times of day such as ("22:00", "07:00")', hours) from None
    if start == end:
        raise ConfigurationError.of("quiet_hours", "two different times of day", hours)
    return start.tm_hour * 60 + start.tm_min, end.tm_hour * 60 + end.tm_min
