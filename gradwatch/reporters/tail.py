"""Follows a run in a terminal: a small picture that renews itself, or lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradwatch.records import Finding
from gradwatch.reporters import words
from gradwatch.reporters.binning import Array

if TYPE_CHECKING:
    from gradwatch.reader import RunReader

#: How many of the latest steps are looked at.
WINDOW = 400
WORST = 6
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_STYLES = {"critical": "red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True, slots=True)
class Glance:
    """The present state of a run.

    Args:
        name: Of the run.
        status: Its status.
        step: The latest step; None for an empty run.
        loss: The latest losses, shape (k,).
        global_norm: The latest global norms, shape (k,).
        rate: Steps per second; None where not known.
        layers: The worst layers with their latest norms, shape (k,) each.
        findings: All findings so far.
    """

    name: str
    status: str
    step: int | None
    loss: Array
    global_norm: Array
    rate: float | None
    layers: tuple[tuple[str, Array], ...]
    findings: tuple[Finding, ...]


def glance(run: RunReader) -> Glance:
    """Look at the latest steps of a run."""
    span, findings = run.span, tuple(run.finding_list())
    name, status = words.visible(run.path.name), run.info.status
    if span is None:
        return Glance(name, status, None, np.empty(0), np.empty(0), None, (), findings)
    window = slice(max(0, span[1] - WINDOW + 1), span[1] + 1)
    metrics = run.metrics(steps=window)
    norms = run.grad_norms(by="layer", steps=window)
    rate = _rate(metrics["time"].to_numpy(np.float64))
    worst = _worst(list(norms.columns), norms.to_numpy(np.float64), findings)
    layers = tuple((name, norms[name].to_numpy(np.float64)) for name in worst)
    loss, whole = (metrics[key].to_numpy(np.float64) for key in ("loss", "global_norm"))
    return Glance(name, status, span[1], loss, whole, rate, layers, findings)


def sparkline(values: Array, width: int = 40, *, bars: str = BARS) -> str:
    """Values as a row of bars, logarithmic where all are above 0; `×` stands for NaN and infinity.

    Examples:
        >>> sparkline(np.array([1.0, 10.0, 100.0, np.nan]), 4)
        '▁▅█×'
    """
    if not len(values):
        return ""
    parts = [_telling(part) for part in np.array_split(values, min(width, len(values)))]
    heights = np.array(parts)
    finite = heights[np.isfinite(heights)]
    if finite.size and finite.min() > 0:
        with np.errstate(invalid="ignore"):
            heights = np.log10(heights)
        finite = np.log10(finite)
    if not finite.size:
        return "×" * len(heights)
    low, spread = finite.min(), max(float(np.ptp(finite)), 1e-12)
    places = np.where(np.isfinite(heights), (heights - low) / spread * (len(bars) - 1), -1).round().astype(int)
    return "".join(bars[place] if place >= 0 else "×" for place in places)


def follow(
    run: RunReader, *, every: float = 1.0, once: bool = False, console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Show a run until it ends.

    Args:
        run: The run.
        every: Seconds between two looks.
        once: Show the present state and return.
        console: Where to write; standard output by default.
        sleep: What waits between two looks.
    """
    out = console or Console(highlight=False)
    if not out.is_terminal:
        for text in lines(run, every=every, once=once, sleep=sleep):
            out.print(text, soft_wrap=True, markup=False)
        return
    with Live(console=out, auto_refresh=False, transient=False) as live:
        for now in _looks(run, every=every, once=once, sleep=sleep):
            live.update(picture(now, out), refresh=True)


def lines(run: RunReader, *, every: float, once: bool, sleep: Callable[[float], None]) -> Iterator[str]:
    """What a pipe is told: a line per look that saw new steps, a line per finding that came or ended."""
    told: dict[str, tuple[str, bool]] = {}
    step: int | None = None
    for now in _looks(run, every=every, once=once, sleep=sleep):
        for finding in now.findings:
            state = (finding.severity, finding.is_open)
            if told.get(finding.id) != state:
                told[finding.id] = state
                yield _finding_line(finding)
        if now.step != step and now.step is not None:
            step = now.step
            yield _step_line(now)
    yield f"{now.name}: {now.status}"


def picture(now: Glance, console: Console) -> RenderableType:
    """What a terminal is shown."""
    bars = BARS if "utf" in (console.encoding or "").lower() else ASCII_BARS
    width = max(10, min(60, console.width - 50))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, max_width=34)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, values in (("loss", now.loss), ("global norm", now.global_norm)):
        table.add_row(Text(name, "bold"), Text(sparkline(values, width, bars=bars)), Text(_last(values), "bold"))
    for name, values in now.layers:
        table.add_row(Text(words.shorten(name, 34)), Text(sparkline(values, width, bars=bars)), Text(_last(values)))
    at = "no step yet" if now.step is None else f"step {words.step(now.step)}"
    rate = f" · {words.number(now.rate)} steps/s" if now.rate else ""
    head = Text.assemble((now.name, "bold"), f"  {now.status} · {at}{rate}")
    found = [Text(_finding_line(f), _STYLES[f.severity]) for f in now.findings[-8:]]
    return Group(head, table, *(found or [Text("No finding.", "green")]))


def _looks(run: RunReader, *, every: float, once: bool, sleep: Callable[[float], None]) -> Iterator[Glance]:
    while True:
        run.refresh()
        now = glance(run)
        yield now
        if once or now.status != "running":
            return
        sleep(every)


def _worst(names: Sequence[str], norms: Array, findings: Sequence[Finding]) -> list[str]:
    """Layers of open findings first, then those whose latest norm is farthest from their median."""
    found = [name for f in findings if f.is_open and f.severity != "info" for name in f.layers]
    with np.errstate(all="ignore"):
        usual = np.array([np.median(c[c > 0]) if (c > 0).any() else np.nan for c in norms.T])
        away = np.abs(np.log(norms[-1] / usual))
    order = np.argsort(-np.nan_to_num(away, nan=np.inf, posinf=np.inf), kind="stable")
    known = set(names)
    return list(dict.fromkeys([*(n for n in found if n in known), *(names[i] for i in order)]))[:WORST]


def _telling(part: Array) -> float:
    """Of several values under one bar the largest; not finite when one is not."""
    return float(part.max()) if np.isfinite(part).all() else float("nan")


def _rate(moments: Array) -> float | None:
    known = moments[np.isfinite(moments)][-50:]
    took = known[-1] - known[0] if len(known) > 1 else 0.0
    return float((len(known) - 1) / took) if took > 0 else None


def _last(values: Array) -> str:
    return words.number(float(values[-1])) if len(values) else "–"


def _step_line(now: Glance) -> str:
    rate = f"  {words.number(now.rate)} steps/s" if now.rate else ""
    return f"step {now.step}  loss {_last(now.loss)}  norm {_last(now.global_norm)}{rate}"


def _finding_line(finding: Finding) -> str:
    if finding.is_open:
        said = words.visible(finding.message) or words.phrase(finding.rule, finding.evidence.get("sign"))
        return f"{finding.severity.upper()} step {words.step(finding.first_step)}: {said}"
    over, since = words.step(finding.resolved_step or finding.last_step), words.step(finding.first_step)
    what = words.lower_first(words.phrase(finding.rule, finding.evidence.get("sign")))
    return f"over at step {over}: {what} (since step {since})"
