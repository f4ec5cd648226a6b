"""What the policy knows of the loss: where it began, where it is, whether it falls."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradwatch.actions.base import RunState
from gradwatch.records import NOT_MEASURED

#: Losses that a median is taken over.
SHORT = 9
#: Losses over which a fall is looked for.
WINDOW = 60
#: A fall of the median by this share within the window counts as learning...
FALL = 0.05
#: ... and so does a loss that is below this share of the first one: bad weights begin above a constant's loss.
WELL_BELOW = 0.5
#: Steps between the learning rates that are remembered, and how many are.
EVERY, KEPT = 10, 100
#: A loss that grows by more than this in one step leaps.
LEAP = 3.0


class Course:
    """Follows the loss and keeps `first_loss`, `loss`, `best_loss` and `learns` of the run's state up to date."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._first: list[float] = []

    def take(self, losses: Iterable[float], state: RunState) -> None:
        """Take the losses of further steps; those not measured are passed over."""
        known = [float(loss) for loss in losses if loss != NOT_MEASURED]
        if not known:
            return
        self._recent.extend(known)
        if len(self._first) < SHORT:
            self._first += [loss for loss in known if math.isfinite(loss)][: SHORT - len(self._first)]
            state.start_loss = self._first[0] if self._first else math.nan
            # Steps that are too large wreck the weights at once: then the very first loss is the one to go by.
            state.first_loss = min(statistics.median(self._first), self._first[0]) if self._first else math.nan
        state.loss = _median(list(self._recent)[-SHORT:])
        state.growth = _growth(list(self._recent))
        state.best_loss = min(state.best_loss, state.loss)
        state.learns = self._learns(state)

    def renew(self) -> None:
        """Forget the recent past: the weights are others now."""
        self._recent.clear()

    def begin_anew(self, state: RunState) -> None:
        """Forget also where the loss began, and its best: the weights have learnt nothing yet."""
        if math.isfinite(state.loss):
            state.given_up = min(state.given_up, state.loss)
        self._first.clear()
        state.best_loss = math.inf

    def _learns(self, state: RunState) -> bool:
        if not math.isfinite(state.loss):
            return False
        is_better = state.loss < state.given_up - FALL * abs(state.given_up)
        if is_well_below(state.loss, state.first_loss) and (is_better or math.isinf(state.given_up)):
            return True
        recent = list(self._recent)
        if len(recent) < 3 * SHORT:
            return False
        past = recent[:-SHORT]
        before = _median(past[:SHORT])
        return before - state.loss > FALL * abs(before) and state.loss < state.first_loss

    def state_dict(self) -> dict[str, Any]:
        """State as JSON types."""
        return {"recent": list(self._recent), "first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._recent, self._first = deque(state["recent"], maxlen=WINDOW), list(state["first"])


def take_rates(step: int, rates: Sequence[float], state: RunState) -> None:
    """Take the learning rates of the steps before `step`: the last, and those before every tenth step."""
    for following, rate in enumerate(rates, start=step - len(rates) + 1):
        if rate > 0:
            state.rate = float(rate)
            if following % EVERY == 0:
                state.rates = [*state.rates[-KEPT:], (following, state.rate * state.lr_factor)]


def is_well_below(loss: float, first: float, share: float = WELL_BELOW) -> bool:
    """Whether a loss is so far below the first one that something was learnt."""
    return loss < first - (1.0 - share) * abs(first)


def _growth(losses: list[float]) -> float:
    """The first leap of a loss over the one before, else the largest rise: leaps on leaps tell of the leap before."""
    rises = [new / old for old, new in itertools.pairwise(losses) if 0 < old < new < math.inf]
    return next((rise for rise in rises if rise > LEAP), max(rises, default=1.0))


def _median(losses: list[float]) -> float:
    """Median in which a loss that is not a number is infinite."""
    return statistics.median(math.inf if math.isnan(loss) else loss for loss in losses)
