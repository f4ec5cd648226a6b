"""The pipeline of a run, the one file that knows all stages: record, detect, decide, tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gradwatch.actions.base import Due
from gradwatch.actions.policy import Policy
from gradwatch.detectors.engine import Engine
from gradwatch.errors import GradwatchError
from gradwatch.faults import Faults
from gradwatch.records import ActionRecord, Finding, RunInfo, StepBatch
from gradwatch.writer import RunWriter

Note = Callable[[str, Mapping[str, Any]], None]
_NO_FINDINGS: list[Finding] = []


class Listener(Protocol):
    """What an alert channel or a sink is to the monitor; each has its own thread and queue and returns at once.

    `open` comes before the first step. Its `note` adds an event to the record, from any thread.
    """

    def open(self, info: RunInfo, run_dir: Path, *, first_step: int, note: Note) -> None:
        """A run begins."""
        ...

    def steps(self, batch: StepBatch) -> None:
        """Steps have ended."""
        ...

    def finding(self, finding: Finding) -> None:
        """A finding opened, changed or resolved."""
        ...

    def action(self, record: ActionRecord) -> None:
        """An action was applied, or its outcome is known."""
        ...

    def close(self, status: str, detail: str) -> None:
        """The run ends."""
        ...


class Monitor:
    """Takes batches of steps and returns the action that is due.

    Args:
        writer: Where the record goes; None records nothing.
        engine: The detectors.
        policy: The actions.
        listeners: Alerts and sinks.
        faults: Keeps failures of each stage to itself.
    """

    def __init__(
        self,
        *,
        writer: RunWriter | None,
        engine: Engine,
        policy: Policy,
        listeners: Sequence[Listener] = (),
        faults: Faults,
    ) -> None:
        self.writer, self.engine, self.policy, self.listeners, self.faults = writer, engine, policy, listeners, faults
        #: By the name under which its failures are noted: of two alike one may fail, and the other goes on.
        self._parts = _named(listeners)
        self.findings: dict[str, Finding] = {}
        self._open: list[Listener] = []

    def open(self, info: RunInfo, run_dir: Path, first_step: int) -> None:
        """Tell the listeners which run begins; before the first step."""
        for name, listener in self._parts.items():
            self.faults.call(name, self._begin, listener, info, run_dir, first_step, default=None)

    def _begin(self, listener: Listener, info: RunInfo, run_dir: Path, first_step: int) -> None:
        self._open.append(listener)
        try:
            listener.open(info, run_dir, first_step=first_step, note=self._event)
        except GradwatchError:  # it serves another run, and must not be closed with this one
            self._open.remove(listener)
            raise

    def record(self, batch: StepBatch) -> None:
        """Hand the batch to the writer."""
        if self.writer:
            self.faults.call("writer", self.writer.write, batch, default=None)

    def look(self, batch: StepBatch) -> Due | None:
        """Look for findings in the batch, tell about them, and say what is due before the next step."""
        findings = self.faults.call("detectors", self._detect, batch, default=_NO_FINDINGS)
        for finding in findings:
            self.report(finding)
        self._tell("steps", batch)
        if not self.policy.between:
            return None
        following, losses, rates = int(batch.step[-1]) + 1, batch.metric("loss"), batch.metric("lr")
        due = self.faults.call("actions", self.policy.decide, following, findings, losses, rates, default=None)
        for record in self.policy.take_news():
            self.record_action(record)
        return due

    def report(self, finding: Finding) -> None:
        """Note a finding: in the record, then to the listeners."""
        self.findings[finding.id] = finding
        urgent = finding.severity == "critical"
        self._event("finding", finding.to_json(), sync=urgent)
        self._tell("finding", finding)

    def acted(self, due: Due, step: int, *, detail: str = "") -> ActionRecord:
        """Note that an action was applied before `step`; `detail` says more of what was done."""
        record = self.policy.applied(due, step, detail=detail)
        self.record_action(record)
        return record

    def could_not_act(self, due: Due, step: int, why: str) -> None:
        """Note that an action that was due before `step` could not be applied."""
        self.record_action(self.policy.failed(due, step, why))

    def record_action(self, record: ActionRecord) -> None:
        """Write an action, or its outcome, to the record and tell the listeners."""
        self._event("action", record.to_json())
        self._tell("action", record)

    def mark(self, text: str, step: int) -> None:
        """Note a line of the user's own in the record."""
        self._event("mark", {"text": text, "step": step})

    def close(self, status: str, detail: str, overhead: Callable[[], dict[str, Any]]) -> None:
        """Close every stage; the writer last. Findings still open are noted once more, with their last step."""
        for finding in self.faults.call("detectors", lambda: self.engine.open_findings, default=_NO_FINDINGS):
            if self.findings.get(finding.id) != finding:
                self.report(finding)
        for name, listener in self._parts.items():
            if any(listener is opened for opened in self._open):
                self.faults.let_go(name, partial(listener.close, status, detail))
        writer = self.writer
        if writer:
            # Also of a writer that failed: its threads still have the steps from before.
            self.faults.let_go(
                "writer", lambda: writer.update_info(overhead=overhead()), partial(writer.close, status, detail)
            )

    def failures(self) -> dict[str, int]:
        """How often what the threads of listeners and writer did has failed."""
        parts = [*self.listeners, *([self.writer] if self.writer else [])]
        counts = [(f"{type(part).__name__} thread", getattr(part, "failures", 0)) for part in parts]
        return {name: sum(count for other, count in counts if other == name) for name, count in counts if count}

    def _detect(self, batch: StepBatch) -> list[Finding]:
        return self.engine.update(batch, on_error=lambda name, error: self.faults.note(f"detector {name}", error))

    def _event(self, kind: str, data: Mapping[str, Any], *, sync: bool = False) -> None:
        if self.writer:
            self.faults.call("writer", self.writer.event, kind, data, sync=sync, default=None)

    def _tell(self, method: str, subject: object) -> None:
        for name, listener in self._parts.items():
            self.faults.call(name, getattr(listener, method), subject, default=None)


def _named(listeners: Sequence[Listener]) -> dict[str, Listener]:
    """The listeners by class, numbered where there are several of one."""
    named: dict[str, Listener] = {}
    for listener in listeners:
        name = type(listener).__name__
        before = sum(type(each).__name__ == name for each in named.values())
        named[f"{name} {before + 1}" if before else name] = listener
    return named
