"""Notices from inside the process that training stands still."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import deque

from gradwatch.alerts.routing import Routing
from gradwatch.records import Finding

#: Steps whose times make the median.
_REMEMBERED = 100
#: Steps before there is a median to speak of.
_FEWEST = 5


class StallWatch:
    """Compares the silence since the last step with the steps before it.

    Args:
        routing: Its `stall` and `stall_seconds`.
    """

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._beats: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)
        self._longest = 0.0
        self._step = 0
        self._stalled: Finding | None = None

    def beat(self, now: float, step: int, steps: int) -> None:
        """Steps have ended: `steps` of them, the last of number `step`. Called by the training thread."""
        if self._beats:
            self._longest = max(self._longest, now - self._beats[-1][0])
        self._beats.append((now, steps))
        self._step = step

    @property
    def step(self) -> int:
        """The last step."""
        return self._step

    def limit(self) -> float:
        """The silence in seconds that counts as a stall; infinity while that cannot be told."""
        beats = list(self._beats)
        if self._routing.stall is None or len(beats) < _FEWEST:
            return math.inf
        gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(beats)]
        steps = statistics.median(count for _, count in beats)
        usual = statistics.median(gaps)
        # Several steps come at once where `check_every` is above 1: the usual silence is not part of a stall.
        limit = usual + self._routing.stall * usual / steps if steps > 1 else self._routing.stall * usual
        return max(limit, 2 * self._longest, self._routing.stall_seconds)

    def look(self, now: float) -> tuple[Finding | None, float]:
        """A finding that opened or resolved, and when to look again."""
        limit = self.limit()
        if not self._beats or math.isinf(limit):
            return None, math.inf if self._routing.stall is None else now + 1.0
        last = self._beats[-1][0]
        if self._stalled is not None and last > self._stalled.evidence["last_beat"]:
            over, self._stalled = self._stalled, None
            return dataclasses.replace(over, last_step=self._step, resolved_step=self._step), last + limit
        if self._stalled is None and now - last >= limit:
            self._stalled = _finding(self._step, last, now - last, limit)
            return self._stalled, now + 1.0
        return None, last + limit if self._stalled is None else now + 1.0


def _finding(step: int, last: float, silence: float, limit: float) -> Finding:
    return Finding(
        id=f"stall@{step}",
        rule="stall",
        severity="critical",
        first_step=step,
        last_step=step,
        value=silence,
        threshold=limit,
        message=f"No step has ended for {silence:.0f} s, after step {step}; the limit is {limit:.0f} s.",
        evidence={"last_beat": last},
        cause="a deadlock, a hung data loader, a dead peer, or a long pause such as a validation",
        advice=("look at the process, for instance with py-spy dump",),
    )
