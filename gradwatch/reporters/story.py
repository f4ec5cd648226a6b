"""The story of a run in order of time: findings gathered into chapters, chapters and actions into events."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradwatch.records import RULES, SEVERITIES, ActionRecord, Finding, RunInfo, Severity
from gradwatch.reporters import words

Kind = Literal["start", "finding", "resolved", "action", "mark", "end", "crash"]
#: Rules that look at the loss: they say that something is wrong, not where.
SYMPTOMS = frozenset({"divergence", "plateau", "oscillation", "stall"})
_RANK = {severity: i for i, severity in enumerate(SEVERITIES)}
_RULE_ORDER = {rule: i for i, rule in enumerate(RULES)}


@dataclass(frozen=True, slots=True)
class Chapter:
    """Findings of one rule that belong together in time.

    Args:
        findings: Ordered by first step; at least one.
    """

    findings: tuple[Finding, ...]

    @property
    def rule(self) -> str:
        """The rule of all its findings."""
        return self.findings[0].rule

    @property
    def phrase(self) -> str:
        """What it says about the run, as the start of a sentence."""
        return words.phrase(self.rule, self.findings[0].evidence.get("sign"))

    @property
    def severity(self) -> Severity:
        """The gravest of its findings' severities."""
        return max((f.severity for f in self.findings), key=_RANK.__getitem__)

    @property
    def first_step(self) -> int:
        """Where it began."""
        return self.findings[0].first_step

    @property
    def last_step(self) -> int:
        """The last step at which it held so far."""
        return max(f.last_step for f in self.findings)

    @property
    def resolved_step(self) -> int | None:
        """From where on none of it held any more; None while one finding is open."""
        steps = [f.resolved_step for f in self.findings if f.resolved_step is not None]
        return max(steps) if len(steps) == len(self.findings) else None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers concerned: where it began first, then those of the first finding, the worst first in each."""
        origin = self.origin
        found = itertools.chain.from_iterable(f.layers for f in self.findings)
        return tuple(dict.fromkeys([*([origin] if origin else []), *found]))

    @property
    def origin(self) -> str:
        """The layer in which the first finding says it began; empty where it only says which is worst."""
        return str(self.findings[0].evidence.get("first_bad_layer") or "")

    @property
    def came_with_the_loss(self) -> bool:
        """Whether the loss went bad first: no layer is then worse than another."""
        return self.findings[0].evidence.get("where") == "loss"

    @property
    def lead(self) -> Finding:
        """The gravest finding, the first one where several are: it speaks for the chapter."""
        return max(self.findings, key=lambda f: (_RANK[f.severity], -f.first_step))

    @property
    def is_open(self) -> bool:
        """Whether it still holds."""
        return self.resolved_step is None

    def when(self) -> str:
        """Its place in time, in words."""
        first, last = words.step(self.first_step), words.step(self.last_step)
        if self.is_open:
            return f"from step {first} on"
        if len(self.findings) > 1 and self.rule == "spike":
            return f"{len(self.findings):,d} times between step {first} and {last}"
        return f"at step {first}" if first == last else f"from step {first} to {last}"

    def where(self, n_layers: int) -> str:
        """Its place in the model, in words; empty for a condition of the whole run."""
        layers = self.layers
        if not layers:
            return ""
        if len(layers) <= 2:
            return f"in {words.listing(layers)}"
        count = f"all {len(layers):,d} layers" if len(layers) == n_layers else f"{len(layers):,d} layers"
        if self.came_with_the_loss:
            return f"in {count}"
        first = self.origin or len({f.first_step for f in self.findings}) > 1
        return f"in {count}, {'first' if first else 'worst'} in {words.shorten(layers[0], 48)}"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Args:
        step: When.
        kind: What sort of thing.
        severity: That of a finding; empty otherwise.
        title: It in one line.
        text: More about it: evidence, cause, outcome.
        layers: Where; empty for the whole run.
    """

    step: int
    kind: Kind
    title: str
    severity: str = ""
    text: str = ""
    layers: tuple[str, ...] = ()


def chapters(findings: Iterable[Finding], *, gap: int = 20) -> list[Chapter]:
    """Gather findings of one rule that overlap or follow within `gap` steps of each other.

    Examples:
        >>> spikes = [Finding(str(s), "spike", "warning", s, s, resolved_step=s + 1) for s in (10, 14, 900)]
        >>> [(c.first_step, len(c.findings)) for c in chapters(spikes)]
        [(10, 2), (900, 1)]
    """
    gathered: list[list[Finding]] = []
    current: dict[str, tuple[list[Finding], float]] = {}
    for finding in sorted(findings, key=_by_time):
        until = finding.last_step + gap
        group, reach = current.get(finding.rule, ([], float("-inf")))
        if finding.first_step > reach:
            group = []
            gathered.append(group)
        group.append(finding)
        current[finding.rule] = (group, max(reach, until))
    return [Chapter(tuple(group)) for group in gathered]


@dataclass(frozen=True, slots=True)
class Trouble:
    """What the verdict is about: where the gravest trouble began, and what it led to.

    Args:
        root: The chapter in which it began.
        followed: Other chapters as grave as what still holds that joined on, in order of time.
    """

    root: Chapter
    followed: tuple[Chapter, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether any of it still holds: an explosion that ended because everything is NaN is not over."""
        return any(c.is_open for c in (self.root, *self.followed))

    @property
    def severity(self) -> Severity:
        """How grave it is now: the gravest of what still holds; of all when it is over."""
        told = (self.root, *self.followed)
        return max((c.severity for c in told if c.is_open or not self.is_open), key=_RANK.__getitem__)

    @property
    def over_at(self) -> int | None:
        """From which step on none of it held; None while it is open."""
        return None if self.is_open else max(c.resolved_step or c.last_step for c in (self.root, *self.followed))

    def when(self) -> str:
        """Its place in time, in words."""
        return f"from step {words.step(self.root.first_step)} on" if self.is_open else self.root.when()


def trouble(all_chapters: Sequence[Chapter], *, gap: int = 20) -> Trouble | None:
    """What the verdict is about; None when nothing grave was found (severity `info` is never a verdict).

    It starts from the gravest open chapter (of all when none is open), goes back in time along chapters at least as
    grave that led into it, and forward along those that joined on: so an explosion that ended in NaN is told as an
    explosion, and it is not over; nor is one that left layers dead.
    """
    grave = [c for c in all_chapters if c.severity != "info"]
    if not grave:
        return None
    main = min(grave, key=lambda c: (not c.is_open, -_RANK[c.severity], *_by_time(c.findings[0])))
    same = [c for c in grave if _RANK[c.severity] >= _RANK[main.severity]]
    same.sort(key=lambda c: _by_time(c.findings[0]))
    start = same.index(main)
    for i in reversed(range(start)):
        if _lasting(same[i], grave, gap) + gap >= same[start].first_step:
            start = i
    followed: list[Chapter] = []
    until = _lasting(same[start], grave, gap)
    for chapter in same[start + 1 :]:
        if chapter.first_step <= until + gap:
            followed.append(chapter)
            until = max(until, _reach(chapter))
    seat = _seat(same[start], grave, gap)
    return Trouble(seat, tuple(c for c in (same[start], *followed) if c is not seat))


def _seat(first: Chapter, grave: Sequence[Chapter], gap: int) -> Chapter:
    """Where the trouble sits: a loss that goes wrong is a symptom of gradients that go wrong about the same time."""
    if first.rule not in SYMPTOMS:
        return first
    near = [c for c in grave if c.rule not in SYMPTOMS and abs(c.first_step - first.first_step) <= gap]
    return min(near, key=lambda c: _by_time(c.findings[0]), default=first)


def _lasting(chapter: Chapter, grave: Sequence[Chapter], gap: int) -> float:
    """Until which step it lasted, or what came of it: an explosion that leaves layers dead is not over."""
    until = _reach(chapter)
    for other in sorted(grave, key=lambda c: c.first_step):
        if chapter.first_step <= other.first_step <= until + gap:
            until = max(until, _reach(other))
    return until


def _reach(chapter: Chapter) -> float:
    return float("inf") if chapter.is_open else chapter.last_step


def events(
    info: RunInfo,
    all_chapters: Sequence[Chapter],
    actions: Sequence[ActionRecord],
    marks: Sequence[dict[str, Any]] = (),
    *,
    span: tuple[int, int] | None = None,
    main: Trouble | None = None,
) -> list[Event]:
    """Everything that happened, in order of time.

    Args:
        info: The facts of the run.
        all_chapters: From `chapters`.
        actions: In any order.
        marks: What the user marked: dictionaries with `step` and `text`.
        span: First and last recorded step; None for an empty run.
        main: What the verdict is about: while it goes on, none of its chapters is told to be over.
    """
    n_layers = len({p.layer for p in info.parameters})
    going_on = [c for c in all_chapters if c.is_open or (main and main.is_open and c in (main.root, *main.followed))]
    told = [_told(c, n_layers) for c in all_chapters]
    told += [_resolved(c) for c in all_chapters if c.last_step > c.first_step and c not in going_on]
    told += _action_events(actions)
    told += [Event(int(m["step"]), "mark", words.visible(str(m.get("text", "mark")))) for m in marks]
    order = {"mark": 0, "finding": 1, "action": 2, "resolved": 3}
    told.sort(key=lambda e: (e.step, order[e.kind]))
    return told + ([_ending(info, span[1])] if span else [])


def _by_time(finding: Finding) -> tuple[int, int]:
    return finding.first_step, _RULE_ORDER.get(finding.rule, len(RULES))


def _told(chapter: Chapter, n_layers: int) -> Event:
    title = " ".join(filter(None, (chapter.phrase, chapter.where(n_layers))))
    if len(chapter.findings) > 1 and not chapter.is_open and chapter.rule == "spike":
        title += f", {len(chapter.findings):,d} times up to step {words.step(chapter.last_step)}"
    cause = words.visible(chapter.lead.cause).rstrip(".")
    text = " ".join(filter(None, (words.visible(chapter.lead.message), f"Likely cause: {cause}." if cause else "")))
    return Event(chapter.first_step, "finding", title, chapter.severity, text, chapter.layers)


def _resolved(chapter: Chapter) -> Event:
    step = chapter.resolved_step or chapter.last_step
    lasted = words.plural(step - chapter.first_step, "step")
    title = f"Over: {words.lower_first(chapter.phrase)}, after {lasted}"
    return Event(step, "resolved", title, layers=chapter.layers)


def _action_events(actions: Sequence[ActionRecord]) -> list[Event]:
    """Actions in order; a row of the same action for the same reason with the same outcome is one event."""
    ordered = sorted(actions, key=lambda a: a.step)
    runs = itertools.groupby(ordered, key=lambda a: (a.action, a.reason, a.outcome, a.dry_run))
    return [_action_event(list(group)) for _, group in runs]


def _action_event(group: list[ActionRecord]) -> Event:
    first, last = group[0], group[-1]
    title = f"{words.visible(first.action)}" + (f" because of {words.visible(first.reason)}" if first.reason else "")
    if len(group) > 1:
        title += f", {len(group):,d} times up to step {words.step(last.step)}"
    if first.dry_run:
        title += " (dry run: not applied)"
    outcome = f"Outcome: {words.visible(last.outcome)}." if last.outcome else ""
    detail = words.visible(last.detail).rstrip(".") + "." if last.detail else change(first, last)
    layers = tuple(dict.fromkeys(itertools.chain.from_iterable(a.layers for a in group)))
    return Event(first.step, "action", title, text=" ".join(filter(None, (detail, outcome))), layers=layers)


def change(first: ActionRecord, last: ActionRecord) -> str:
    """What a row of actions changed, as `before → after`; empty where no number is known."""
    if first.before != first.before or last.after != last.after:
        return ""
    return f"{words.number(first.before)} → {words.number(last.after)}."


def _ending(info: RunInfo, last_step: int) -> Event:
    if info.status == "crashed":
        return Event(last_step, "crash", "The run crashed", "critical", words.visible(info.status_detail))
    words_of = {"running": "Latest step of a run that is still being written", "finished": "The run finished"}
    return Event(last_step, "end", words_of.get(info.status, f"The run is {words.visible(info.status)}"))
