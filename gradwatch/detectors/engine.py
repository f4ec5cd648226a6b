"""Runs the detectors over the steps of a run, live or in replay, and adds cause and advice to what they find."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from gradwatch.detectors.base import Detector, RunContext
from gradwatch.detectors.catalogue import CATALOGUE
from gradwatch.detectors.evidence import symptoms
from gradwatch.detectors.rule import Rule
from gradwatch.detectors.signals import Signals
from gradwatch.diagnosis import diagnosed
from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.records import RENEWED, Finding, StepBatch

OwnRule = Callable[[StepBatch], Iterable[Finding]]
Chosen = str | type[Detector] | Detector | OwnRule
OnError = Callable[[str, Exception], object]


class Engine:
    """All detectors of a run.

    Args:
        detectors: "default" (every built-in rule), or a list of rule names, detector classes, detectors, and plain
            functions that take a `StepBatch` and return findings.
        context: What is known of the run.

    Raises:
        UnknownNameError: A rule that does not exist.
        ConfigurationError: Something that is no detector.

    Examples:
        >>> from gradwatch.records import Parameter, StepBatch
        >>> import numpy as np
        >>> engine = Engine(["nonfinite"], RunContext((Parameter("fc.weight"),)))
        >>> found = engine.update(StepBatch(engine.context.parameters, np.array([0]), np.array([[np.nan]])))
        >>> found[0].rule, found[0].severity
        ('nonfinite', 'critical')
    """

    def __init__(self, detectors: str | Sequence[Chosen], context: RunContext) -> None:
        self.context = context
        chosen: Sequence[Chosen]
        if isinstance(detectors, str):
            chosen = list(CATALOGUE) if detectors == "default" else [detectors]
        else:
            chosen = list(detectors)
        self._detectors = [_made(one) for one in chosen]
        self._rules = [(i, d) for i, d in enumerate(self._detectors) if isinstance(d, Rule)]
        self._own = [(i, d) for i, d in enumerate(self._detectors) if not isinstance(d, Rule)]
        self._signals = Signals()
        self._signals.begin(context)
        self._off: set[int] = set()
        self._open: dict[str, Finding] = {}
        self._latest: dict[str, Finding] = {}
        self._causes: dict[str, dict[str, Any]] = {}
        for detector in self._detectors:
            detector.start(context)

    @property
    def names(self) -> list[str]:
        """The detectors' names, in order."""
        return [_name(detector) for detector in self._detectors]

    @property
    def open_findings(self) -> list[Finding]:
        """The findings that are open, as they stand now."""
        states = [rule.current for i, rule in self._rules if i not in self._off]
        current = {state.id: self._diagnosed(state) for state in states if state is not None}
        return [current.get(key, finding) for key, finding in self._open.items()]

    def update(self, batch: StepBatch, on_error: OnError | None = None) -> list[Finding]:
        """Findings that opened, changed or resolved in these steps, with message, cause and advice.

        Args:
            batch: Steps that follow those seen before.
            on_error: Called with a detector's name and its exception; that detector is then switched off. Without it
                the exception is raised.
        """
        if len(batch.parameters) > len(self.context.parameters):
            self.extend(dataclasses.replace(self.context, parameters=batch.parameters))
        found: list[Finding] = []
        begun = 0
        for row in np.flatnonzero(batch.metric(RENEWED) == 1.0).tolist():
            found += self._update(batch[begun:row], on_error) + self._renew(int(batch.step[row]))
            begun = row
        return found + self._update(batch[begun:] if begun else batch, on_error)

    def _renew(self, step: int) -> list[Finding]:
        """Learn anew from `step` on, where a remedy gave the network other weights: what was found is over."""
        over = [dataclasses.replace(finding, resolved_step=step) for finding in self.open_findings]
        self._signals.begin(self.context)
        for detector in self._detectors:
            detector.start(self.context)
        for memory in (self._open, self._latest, self._causes):
            memory.clear()
        return over

    def _update(self, batch: StepBatch, on_error: OnError | None) -> list[Finding]:
        if not len(batch):
            return []
        found = self._run_rules(batch, on_error)
        for i, detector in self._own:
            if i not in self._off:
                try:
                    found += detector.update(batch)
                except Exception as error:  # noqa: BLE001 -- a detector of the user's may raise anything
                    self._fail(i, error, on_error)
        for finding in found:
            if finding.is_open:
                self._open[finding.id] = finding
            else:
                self._open.pop(finding.id, None)
                self._causes.pop(finding.id, None)
        return found

    def extend(self, context: RunContext) -> None:
        """Go on with a run that gained parameters; the old ones come first, unchanged."""
        self._signals.grow(context)
        for detector in self._detectors:
            detector.extend(context)
        self.context = context

    def config(self) -> dict[str, Any]:
        """The detectors and their thresholds as JSON; `from_config` builds an equal engine."""
        return {"detectors": [{"name": _name(d), "config": d.config()} for d in self._detectors]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], context: RunContext) -> Self:
        """The engine that `config` describes. Detectors of the user's own cannot be rebuilt and are passed over."""
        entries = config.get("detectors", "default")
        if isinstance(entries, str):
            return cls(entries, context)
        known = [e for e in entries if e["name"] in CATALOGUE]
        return cls([CATALOGUE[entry["name"]](**entry.get("config", {})) for entry in known], context)

    def state_dict(self) -> dict[str, Any]:
        """All state as numpy arrays and JSON types."""
        return {
            "signals": self._signals.remembered(),
            "detectors": {f"{i}:{_name(d)}": d.state_dict() for i, d in enumerate(self._detectors)},
            "open": {key: finding.to_json() for key, finding in self._open.items()},
            "latest": {rule: finding.to_json() for rule, finding in self._latest.items()},
            "causes": copy.deepcopy(self._causes),
            "off": sorted(self._off),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state saved by `state_dict` of an engine with the same detectors and parameters.

        Raises:
            ConfigurationError: The state belongs to other detectors.
        """
        names = [f"{i}:{_name(d)}" for i, d in enumerate(self._detectors)]
        if list(state["detectors"]) != names:
            raise ConfigurationError.of("state", f"of detectors {names}", list(state["detectors"]))
        self._signals.recall(state["signals"])
        for name, detector in zip(names, self._detectors, strict=True):
            detector.load_state_dict(state["detectors"][name])
        self._open = {key: Finding.from_json(data) for key, data in state["open"].items()}
        self._latest = {rule: Finding.from_json(data) for rule, data in state["latest"].items()}
        self._causes = copy.deepcopy(dict(state["causes"]))
        self._off = set(state["off"])

    def _run_rules(self, batch: StepBatch, on_error: OnError | None) -> list[Finding]:
        rules = [(i, rule) for i, rule in self._rules if i not in self._off]
        found: list[Finding] = []
        if not rules:
            return found
        try:
            for now in self._signals.advance(batch):
                news, broken = self._step(rules, now, on_error)
                if news:
                    found += self._told(news)
                if broken:
                    rules = [item for item in rules if item[0] not in broken]
        except Exception as error:
            if on_error is None:
                raise
            self._off.update(i for i, _ in rules)
            on_error("signals", error)
        return found

    def _step(
        self, rules: list[tuple[int, Rule]], now: Signals, on_error: OnError | None
    ) -> tuple[list[Finding], list[int]]:
        """Let those rules look at a step that have a reason to; what they tell, and which of them broke."""
        news: list[Finding] = []
        broken: list[int] = []
        events = now.events
        for i, rule in rules:
            if rule.wakes_on & events or rule.awake:
                try:
                    rule.step(now)
                except Exception as error:  # noqa: BLE001 -- a broken rule must not take the others along
                    self._fail(i, error, on_error)
                    broken.append(i)
                if rule.changes:
                    news += rule.take()
        return news, broken

    def _fail(self, i: int, error: Exception, on_error: OnError | None) -> None:
        if on_error is None:
            raise error
        self._off.add(i)
        on_error(_name(self._detectors[i]), error)

    def _told(self, findings: list[Finding]) -> list[Finding]:
        self._latest.update((finding.rule, finding) for finding in findings)
        told = [self._diagnosed(finding) for finding in findings]
        self._causes.update((finding.id, _diagnosis(finding)) for finding in told)
        return told

    def _diagnosed(self, finding: Finding) -> Finding:
        """The finding with the cause of its opening, when most is known of what led to it, until it gets graver."""
        known = self._causes.get(finding.id)
        if known is not None and known["severity"] == finding.severity:
            return dataclasses.replace(
                finding,
                cause=known["cause"],
                advice=tuple(known["advice"]),
                evidence={**finding.evidence, **known["evidence"]},
            )
        return diagnosed(symptoms(finding, self._signals, self._latest), framework=self.context.framework)


def replay(batches: Iterable[StepBatch], engine: Engine) -> list[Finding]:
    """The findings of a whole run: the final state of each, in order of their opening."""
    found: dict[str, Finding] = {}
    for batch in batches:
        found.update((finding.id, finding) for finding in engine.update(batch))
    found.update((finding.id, finding) for finding in engine.open_findings)
    return list(found.values())


class FunctionDetector(Detector):
    """A plain function over the step batch as a detector; it keeps whatever state it wants by itself."""

    rules = ()

    def __init__(self, function: OwnRule) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def start(self, context: RunContext) -> None:
        """Nothing to prepare."""

    def extend(self, context: RunContext) -> None:
        """Nothing to prepare."""

    def update(self, batch: StepBatch) -> list[Finding]:
        """What the function returns."""
        return list(self.function(batch) or ())

    def config(self) -> dict[str, Any]:
        """A function has no thresholds that could be written down."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """A function's state is its own."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A function's state is its own."""


def _made(one: Chosen) -> Detector:
    if isinstance(one, str):
        if one not in CATALOGUE:
            raise UnknownNameError.among("rule", one, CATALOGUE)
        return CATALOGUE[one]()
    if isinstance(one, Detector):
        return one
    if isinstance(one, type):
        if issubclass(one, Detector):
            return one()
    elif callable(one):
        return FunctionDetector(one)
    rule = "rule names, Detector classes or instances, or functions of a StepBatch"
    raise ConfigurationError.of("detectors", rule, one)


def _name(detector: Detector) -> str:
    return detector.rule if isinstance(detector, Rule) else getattr(detector, "name", type(detector).__name__)


def _diagnosis(finding: Finding) -> dict[str, Any]:
    evidence = {key: finding.evidence[key] for key in ("cause_id",) if key in finding.evidence}
    return {
        "severity": finding.severity, "cause": finding.cause, "advice": list(finding.advice), "evidence": evidence,
    }  # fmt: skip
