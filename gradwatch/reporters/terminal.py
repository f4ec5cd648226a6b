"""The summary and the list of runs in a terminal; in a pipe the same words without colour."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradwatch.records import Finding
from gradwatch.reporters import words
from gradwatch.reporters.listing import RunRow
from gradwatch.reporters.summary import Summary
from gradwatch.reporters.text import SIGNS
from gradwatch.reporters.verdict import STATE_WORDS, State

STATE_STYLES: dict[State, str] = {
    "healthy": "bold green", "recovered": "bold cyan", "warning": "bold yellow", "sick": "bold red",
    "crashed": "bold red", "empty": "bold", "unjudged": "bold",
}  # fmt: skip
SEVERITY_STYLES = {"critical": "red", "warning": "yellow", "info": "cyan"}
MOST_EVENTS = 20


def summary(summary: Summary) -> RenderableType:
    """The summary as rich draws it: verdict, questions and answers, story, the run's facts."""
    verdict = summary.verdict
    style = STATE_STYLES[verdict.state]
    head = Text.assemble(
        (f" {verdict.sign} {verdict.word.upper()} ", f"{style} reverse"), ("  " + summary.name, "bold")
    )
    parts: list[RenderableType] = [head, Padding(Text(verdict.headline, style), (0, 0, 1, 1))]
    if verdict.facts:
        parts.append(Padding(_pairs(verdict.facts, "bold"), (0, 0, 1, 1)))
    if len(summary.story) > 1:
        parts += [Text(" What happened", "bold"), Padding(_story(summary), (0, 0, 1, 1))]
    parts.append(Padding(_pairs(summary.facts, "dim"), (0, 0, 0, 1)))
    parts += [Text(f" ! {note}", "yellow") for note in summary.notes]
    return Group(*parts)


def runs(rows: Iterable[RunRow]) -> RenderableType:
    """The runs under a root, one line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "verdict", "steps", "last loss", "last sign of life", "what is wrong"):
        right = name in ("steps", "last loss")
        table.add_column(name, justify="right" if right else "left", no_wrap=name == "verdict", overflow="fold")
    for row in rows:
        word, sign = STATE_WORDS[row.state]
        loss = "–" if row.loss is None else words.number(row.loss)
        seen = f"{words.duration(max(0.0, time.time() - row.heartbeat))} ago" if row.heartbeat else ""
        seen = f"{row.status}, {seen}" if row.status.startswith("running") else seen
        worst = Text(row.worst, SEVERITY_STYLES.get(row.severity, ""))
        table.add_row(
            Text(row.name, "bold"),
            Text(f"{sign} {word}", STATE_STYLES[row.state]),
            words.step(row.steps),
            loss,
            Text(seen),
            worst,
        )
    return table


def show(renderable: RenderableType, console: Console | None = None) -> None:
    """Print to the terminal; colour only where the terminal has it."""
    (console or Console(highlight=False, soft_wrap=False)).print(renderable)


def _pairs(pairs: Iterable[tuple[str, str]], style: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name, style), Text(value))
    return table


def _story(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    events = summary.story
    shown = events if len(events) <= MOST_EVENTS else (*events[: MOST_EVENTS - 1], events[-1])
    for event in shown:
        if event is events[-1] and len(shown) < len(events):
            table.add_row("", "", Text(f"… {len(events) - len(shown):,d} more (see the report)", "dim"))
        style = SEVERITY_STYLES.get(event.severity, "green" if event.kind in ("action", "resolved") else "")
        table.add_row(Text(words.step(event.step), "dim"), Text(SIGNS[event.kind], style), Text(event.title, style))
    return table


def brief(summary: Summary) -> RenderableType:
    """The verdict in two lines."""
    verdict = summary.verdict
    style = STATE_STYLES[verdict.state]
    return Text.assemble((f"{verdict.sign} {verdict.word}", style), (f"  {summary.name}\n  ", "bold"), verdict.headline)


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table; the first column names the rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, "bold" if place == 0 else "") for place, cell in enumerate(row)))
    return table


def comparison(head: Sequence[str], rows: Iterable[Sequence[str]], said: Sequence[str]) -> RenderableType:
    """Runs side by side, and where the first two part."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, "bold" if place == 0 else "") for place, cell in enumerate(row)))
    return Group(table, Text(), *(Text(line) for line in said))


def findings(found: Sequence[Finding], *, failing: int, level: str) -> RenderableType:
    """What a check found, one line each, and its result."""
    table = Table.grid(padding=(0, 2))
    for name in ("severity", "rule", "steps", "message"):
        table.add_column(no_wrap=name != "message", overflow="fold")
    for f in found:
        steps = (
            f"{words.step(f.first_step)}–{words.step(f.last_step)}"
            if f.first_step != f.last_step
            else words.step(f.first_step)
        )
        style = SEVERITY_STYLES[f.severity]
        said = words.visible(f.message) or words.phrase(f.rule)
        table.add_row(Text(f.severity, style), Text(words.visible(f.rule), style), Text(steps), Text(said))
    result = (
        f"{words.plural(failing, 'finding')} at or above '{level}'."
        if failing
        else f"No finding at or above '{level}'."
    )
    parts: list[RenderableType] = [table] if found else []
    return Group(*parts, Text(result, "bold red" if failing else "bold green"))
