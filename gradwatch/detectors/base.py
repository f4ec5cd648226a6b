"""What every detector is: record in, findings out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gradwatch.records import Finding, Layers, Parameter, StepBatch


@dataclass(frozen=True)
class RunContext:
    """What a detector may know of a run besides its steps.

    Args:
        parameters: In column order of the batches. A run may gain parameters later; the engine then calls `start` of
            `Detector.extend` with the longer context.
        framework: Such as `torch`; only words depend on it.
        config: Settings of the run as JSON.
    """

    parameters: tuple[Parameter, ...]
    framework: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    layers: Layers = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", Layers(self.parameters))


class Detector(ABC):
    """Looks at the record and yields findings.

    Pure: what it yields depends on the steps it was fed and on nothing else (no clock, no randomness), and not on how
    the steps were cut into batches. So a replay of the record finds what was found live (law 6).
    """

    #: The rules that this detector can find.
    rules: ClassVar[tuple[str, ...]]

    @abstractmethod
    def start(self, context: RunContext) -> None:
        """Forget everything and prepare for a run with these parameters."""

    @abstractmethod
    def extend(self, context: RunContext) -> None:
        """Go on with a run that gained parameters: the old ones come first, unchanged."""

    @abstractmethod
    def update(self, batch: StepBatch) -> list[Finding]:
        """Findings that opened, changed (`last_step`, worst value, severity) or resolved in these steps.

        A finding that only goes on is reported again at most when its severity rises or its worst value grew clearly,
        not at every step. Vectorised over layers: O(layers) a step.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The thresholds in force, as JSON: keyword arguments that build an equal detector."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All state as numpy arrays and JSON types; `load_state_dict` of an equal detector goes on from it."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state saved by `state_dict`, after `start` with the same parameters."""
