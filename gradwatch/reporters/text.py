"""The summary as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gradwatch.reporters import words
from gradwatch.reporters.story import Event
from gradwatch.reporters.summary import Summary

#: Signs of the story's events; the words beside them say the same.
SIGNS = {"start": "○", "finding": "●", "resolved": "✔", "action": "◆", "mark": "⚑", "end": "■", "crash": "✖"}


def markdown(summary: Summary) -> str:
    """The report as Markdown, for an issue or a pull request."""
    verdict = summary.verdict
    parts = [f"# {verdict.sign} {verdict.word}: {escaped(summary.name)}", f"**{escaped(verdict.headline)}**"]
    parts += [f"> {escaped(note)}" for note in summary.notes]
    if verdict.facts:
        parts.append(table(("", ""), [(f"**{escaped(q)}**", escaped(a)) for q, a in verdict.facts]))
    if summary.story:
        rows = [(words.step(e.step), f"{SIGNS[e.kind]} {escaped(e.title)}", escaped(e.text)) for e in summary.story]
        parts += ["## What happened", table(("step", "what", "more"), rows)]
    if summary.findings:
        parts += [
            "## Findings",
            table(
                ("rule", "severity", "steps", "layers", "value", "threshold", "cause", "advice"), _finding_rows(summary)
            ),
        ]
    if summary.actions:
        parts += [
            "## Actions",
            table(("step", "action", "layers", "reason", "before → after", "outcome"), _action_rows(summary)),
        ]
    facts = [(escaped(name), escaped(value)) for name, value in summary.facts]
    versions = [(escaped(name), escaped(str(value))) for name, value in summary.info.versions.items()]
    parts += ["## The run", table(("", ""), facts + versions)]
    return "\n\n".join(parts) + "\n"


def to_json(summary: Summary) -> str:
    """The report as JSON text."""
    return json.dumps(summary.to_json(), indent=2, allow_nan=False, default=str) + "\n"


def line(event: Event) -> str:
    """An event in one line."""
    return f"step {words.step(event.step)}  {SIGNS[event.kind]} {event.title}"


def _finding_rows(summary: Summary) -> list[tuple[str, ...]]:
    rows = []
    for f in summary.findings:
        steps = f"{words.step(f.first_step)}–{words.step(f.last_step)}{' (open)' if f.is_open else ''}"
        cells = (f.rule, f.severity, steps, words.listing(f.layers), words.number(f.value), words.number(f.threshold))
        rows.append(tuple(escaped(words.visible(c)) for c in (*cells, f.cause, f.advice[0] if f.advice else "")))
    return rows


def _action_rows(summary: Summary) -> list[tuple[str, ...]]:
    rows = []
    for a in summary.actions:
        changed = f"{words.number(a.before)} → {words.number(a.after)}"
        cells = (words.step(a.step), a.action, words.listing(a.layers), a.reason, changed, a.outcome)
        rows.append(tuple(escaped(words.visible(c)) for c in cells))
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells are escaped already."""
    lines: list[Sequence[str]] = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no links, no table borders."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return text.replace("\n", " ")
