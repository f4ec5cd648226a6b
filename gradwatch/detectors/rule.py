"""What the built-in rules share: checked thresholds, shared signals, one finding at a time."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gradwatch.detectors.base import Detector, RunContext
from gradwatch.detectors.life import Life, Sign
from gradwatch.detectors.memory import Remembers
from gradwatch.detectors.signals import EVERY_STEP, Signals
from gradwatch.errors import ConfigurationError
from gradwatch.records import Finding, StepBatch


def threshold(default: float, *, above: float | None = None, least: float | None = None, most: float = math.inf) -> Any:
    """A field of a rule with the range that it must be in; an int default wants whole numbers."""
    low = f"> {above:g}" if above is not None else f">= {least:g}" if least is not None else ""
    words = " and ".join(part for part in (low, f"<= {most:g}" if most < math.inf else "") if part)
    metadata = {"above": above, "least": least, "most": most, "words": words, "whole": isinstance(default, int)}
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True, eq=False)
class Rule(Detector, Remembers):
    """Base of the built-in rules: thresholds as fields, `Kept` attributes as memory, and `look`."""

    calm: int = threshold(20, least=1)

    rule: ClassVar[str]
    #: The events at which the rule must look although it saw nothing at the step before.
    wakes_on: ClassVar[int] = EVERY_STEP
    #: A rise of badness that is told at once.
    jump: ClassVar[float] = math.log(10)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.metadata:
                _check(f.name, getattr(self, f.name), f.metadata)
        self._signals: Signals | None = None
        #: Whether the rule must look at the next step in any case; what follows something sets `follows`.
        self.awake, self.follows = True, False
        self.life = Life(self.rule, calm=self.calm, jump=self.jump)
        self.changes: list[Finding] = []

    @abstractmethod
    def look(self, now: Signals) -> Sign | None:
        """What this rule sees at this step."""

    @abstractmethod
    def words(self, finding: Finding) -> str:
        """One sentence for a person."""

    def step(self, now: Signals) -> None:
        """Look at one step and follow the finding; news are appended to `changes`."""
        sign = self.look(now)
        if sign is not None:
            self.awake = True
            news = self.life.note(now.step, sign)
        elif self.life.open:
            news = self.life.rest(now.step)
        else:
            self.awake = self.follows
            return
        if news is not None:
            self.changes.append(self.worded(news))

    def worded(self, finding: Finding) -> Finding:
        """The finding with its message."""
        return dataclasses.replace(finding, message=self.words(finding))

    @property
    def current(self) -> Finding | None:
        """The open finding as it stands; None when none is open."""
        return self.worded(self.life.finding()) if self.life.open else None

    def start(self, context: RunContext) -> None:
        """Forget everything and prepare for a run with these parameters."""
        self.begin(context)
        self.life.begin(context)
        self.changes = []
        self.awake, self._signals = True, None

    def extend(self, context: RunContext) -> None:
        """Go on with a run that gained parameters."""
        if self._signals is not None:
            self._signals.grow(context)
        self.grow(context)
        self.life.grow(context)
        self.awake = True

    def update(self, batch: StepBatch) -> list[Finding]:
        """Findings that opened, changed or resolved in these steps. An engine shares signals; this keeps its own."""
        if self._signals is None:
            self._signals = Signals()
            self._signals.begin(self.context)
        for now in self._signals.advance(batch):
            self.step(now)
        return self.take()

    def take(self) -> list[Finding]:
        """The news since the last call."""
        news, self.changes = self.changes, []
        return news

    def config(self) -> dict[str, Any]:
        """The thresholds in force."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def state_dict(self) -> dict[str, Any]:
        """All state as numpy arrays and JSON types."""
        state: dict[str, Any] = {"own": self.remembered(), "life": self.life.remembered()}
        if self._signals is not None:
            state["signals"] = self._signals.remembered()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state saved by `state_dict`."""
        self.recall(state["own"])
        self.life.recall(state["life"])
        self.awake = True
        if "signals" in state:
            self._signals = Signals()
            self._signals.begin(self.context)
            self._signals.recall(state["signals"])


def _check(name: str, value: object, limits: Mapping[str, Any]) -> None:
    kind = "a whole number" if limits["whole"] else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ConfigurationError.of(name, f"{kind} {limits['words']}".strip(), value)
    if limits["whole"] and (math.isinf(value) or value != int(value)):
        raise ConfigurationError.of(name, f"{kind} {limits['words']}".strip(), value)
    above, least, most = limits["above"], limits["least"], limits["most"]
    if (above is not None and value <= above) or (least is not None and value < least) or value > most:
        raise ConfigurationError.of(name, limits["words"], value)
