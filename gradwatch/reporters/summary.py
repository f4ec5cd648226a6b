"""The summary of a run: verdict, story, and the numbers behind them. Every other reporter starts here."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradwatch.records import ActionRecord, Finding, RunInfo
from gradwatch.reporters import words
from gradwatch.reporters.digest import is_thinned
from gradwatch.reporters.story import Chapter, Event, Trouble, chapters, events, trouble
from gradwatch.reporters.verdict import Numbers, Verdict, judge

if TYPE_CHECKING:
    from gradwatch.reader import RunReader

#: After so many seconds without a sign of life a run that calls itself running is doubted.
SILENCE = 120.0


@dataclass(frozen=True, slots=True)
class Summary:
    """What is to be said about a run.

    Args:
        name: Of the run: its directory's name.
        path: Of the run.
        info: The facts of the run.
        numbers: The few numbers the verdict speaks of.
        verdict: State, headline, questions and answers.
        chapters: Findings gathered in time.
        trouble: What the verdict is about; None when nothing is wrong.
        story: Everything that happened, in order of time.
        findings: As recorded.
        actions: As recorded.
        notes: What else must be known, of gradwatch itself above all.
    """

    name: str
    path: Path
    info: RunInfo
    numbers: Numbers
    verdict: Verdict
    chapters: tuple[Chapter, ...]
    trouble: Trouble | None
    story: tuple[Event, ...]
    findings: tuple[Finding, ...]
    actions: tuple[ActionRecord, ...]
    notes: tuple[str, ...] = ()

    @property
    def root(self) -> Chapter | None:
        """The chapter in which the trouble began; None when nothing is wrong."""
        return self.trouble.root if self.trouble else None

    @property
    def status(self) -> str:
        """The run's status in words, with a doubt about one that has fallen silent."""
        info = self.info
        if info.status == "crashed":
            return f"crashed: {words.visible(info.status_detail)}" if info.status_detail else "crashed"
        silent = time.time() - info.heartbeat
        if info.status == "running" and silent > SILENCE:
            return f"running, but no sign of life for {words.duration(silent)}"
        return words.visible(info.status)

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Name and value of what frames the run."""
        info, numbers = self.info, self.numbers
        layers = len({p.layer for p in info.parameters})
        ended = info.ended if info.ended is not None else info.heartbeat
        size = sum(p.size for p in info.parameters)
        facts = [
            ("status", self.status),
            ("steps", words.step(numbers.steps)),
            ("loss", " → ".join(words.number(v) for v in numbers.loss) if numbers.loss and self.trouble else ""),
            (
                "model",
                f"{words.plural(layers, 'layer')}, {words.plural(len(info.parameters), 'tensor')}, {size:,d} weights",
            ),
            ("started", words.moment(info.started) if info.started else ""),
            ("took", words.duration(max(0.0, ended - info.started)) if info.started else ""),
            ("gradwatch's own cost", overhead(info, numbers)),
        ]
        return tuple((name, value) for name, value in facts if value)

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON types."""
        return {
            "name": self.name,
            "path": str(self.path),
            "state": self.verdict.state,
            "headline": self.verdict.headline,
            "answers": dict(self.verdict.facts),
            "status": self.info.status,
            "status_detail": self.info.status_detail,
            "numbers": dataclasses.asdict(self.numbers),
            "story": [dataclasses.asdict(event) for event in self.story],
            "findings": [finding.to_json() for finding in self.findings],
            "actions": [action.to_json() for action in self.actions],
            "overhead": dict(self.info.overhead),
            "versions": dict(self.info.versions),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        verdict = self.verdict
        lines = [f"{verdict.sign} {verdict.word.upper()}  {self.name}", f"  {verdict.headline}", ""]
        width = max((len(question) for question, _ in verdict.facts), default=0)
        lines += [f"  {question:<{width}}  {answer}" for question, answer in verdict.facts]
        lines += ["", *(f"  {name}: {value}" for name, value in self.facts), *(f"  ! {note}" for note in self.notes)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from gradwatch.reporters.templating import environment

        return environment().get_template("card.html").render(s=self)


def summarize(run: RunReader) -> Summary:
    """Read a run and say what happened.

    Args:
        run: A run; also one that is still being written, has crashed or is empty.
    """
    findings, actions = tuple(run.finding_list()), tuple(run.action_list())
    numbers = count(run.metrics())
    gap = story_gap(numbers)
    gathered = tuple(chapters(findings, gap=gap))
    main = trouble(gathered, gap=gap)
    span = None if numbers.first is None or numbers.last is None else (numbers.first, numbers.last)
    return Summary(
        name=words.visible(run.path.name),
        path=run.path,
        info=run.info,
        numbers=numbers,
        verdict=judge(run.info, gathered, main, actions=actions, numbers=numbers),
        chapters=gathered,
        trouble=main,
        story=tuple(events(run.info, gathered, actions, run.marks(), span=span, main=main)),
        findings=findings,
        actions=actions,
        notes=(*_notes(run.info), *_thinned(run, numbers)),
    )


def count(metrics: pd.DataFrame) -> Numbers:
    """The numbers of a run from its metrics."""
    if metrics.empty:
        return Numbers(steps=0)
    coefficient = _finite(metrics, "clip_coefficient")
    loss = _finite(metrics, "loss")
    factor = _finite(metrics, "lr_factor")
    hook, whole = _finite(metrics, "hook_time").sum(), _finite(metrics, "step_time").sum()
    return Numbers(
        steps=len(metrics),
        first=int(metrics.index[0]),
        last=int(metrics.index[-1]),
        loss=(float(loss[0]), float(loss[-1])) if loss.size else None,
        skipped=int((_finite(metrics, "skipped") > 0).sum()),
        clipped=int((coefficient < 1).sum()),
        hardest_clip=float(coefficient.min(initial=1.0)),
        lr_factor=float(factor[-1]) if factor.size else 1.0,
        overhead=float(hook / whole) if whole > 0 else None,
    )


def story_gap(numbers: Numbers) -> int:
    """How many steps apart two findings of a rule may lie and still belong together: 2 % of the run, at least 20."""
    return max(20, numbers.steps // 50)


def overhead(info: RunInfo, numbers: Numbers) -> str:
    """What gradwatch cost the run, as it measured itself."""
    own = info.overhead
    seconds, steps = own.get("hook_seconds"), own.get("steps")
    said = []
    if seconds and steps:
        said.append(f"{words.duration(seconds / steps)} a step")
    share = seconds / own["step_seconds"] if seconds and own.get("step_seconds") else numbers.overhead
    if share is not None:
        said.append(f"{words.percent(share)} of the step time")
    if own.get("bytes_written"):
        said.append(f"{words.size(own['bytes_written'])} written")
    return ", ".join(said)


def _finite(metrics: pd.DataFrame, name: str) -> Any:
    if name not in metrics:
        return np.empty(0)
    values = metrics[name].to_numpy(dtype=np.float64, na_value=np.nan)
    return values[np.isfinite(values)]


def _thinned(run: RunReader, numbers: Numbers) -> tuple[str, ...]:
    if not is_thinned(run, numbers.steps):
        return ()
    kept, first, last = words.plural(numbers.steps, "step"), numbers.first or 0, numbers.last or 0
    said = f"Compacted: {kept} of steps {words.step(first)} to {words.step(last)} kept in full"
    return (f"{said}; of the others the rollups remain, and the charts show them.",)


def _notes(info: RunInfo) -> tuple[str, ...]:
    errors = dict(info.overhead.get("errors") or {})
    notes = [
        f"gradwatch's own part '{words.visible(k)}' failed and was off: {words.visible(str(v))}"
        for k, v in errors.items()
    ]
    if info.overhead.get("dropped_steps"):
        notes.append(
            f"{words.plural(int(info.overhead['dropped_steps']), 'step')} could not be written and are missing."
        )
    if info.config.get("dry_run"):
        notes.append("Dry run: actions were decided and noted, none was applied.")
    return tuple(notes)
