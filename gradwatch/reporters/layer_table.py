"""One row per layer: what it is, how its gradients were, what was found about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gradwatch.records import SEVERITIES, Finding, Parameter
from gradwatch.reporters import words
from gradwatch.reporters.digest import Digest

COLUMNS = (
    ("layer", False), ("depth", True), ("kind", False), ("tensors", True), ("weights", True), ("first", True),
    ("median", True), ("last", True), ("smallest", True), ("largest", True), ("findings", False),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the table.

    Args:
        text: What is shown.
        key: What the column is sorted by; None for the text itself.
        cls: CSS class.
    """

    text: str
    key: float | None = None
    cls: str = ""


def layer_rows(digest: Digest, parameters: Iterable[Parameter], findings: Iterable[Finding]) -> list[list[Cell]]:
    """The rows of the table, in order of depth."""
    own: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        own.setdefault(parameter.layer, []).append(parameter)
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        for layer in finding.layers:
            found.setdefault(layer, []).append(finding)
    return [
        _row(place, name, own.get(name, []), found.get(name, []), digest) for place, name in enumerate(digest.layers)
    ]


def _row(place: int, name: str, own: list[Parameter], found: list[Finding], digest: Digest) -> list[Cell]:
    mid, low, high = (part[:, place] for part in (digest.norms.mid, digest.norms.low, digest.norms.high))
    measured = mid[np.isfinite(mid)]
    numbers = [
        measured[0] if measured.size else np.nan,
        float(np.median(measured)) if measured.size else np.nan,
        measured[-1] if measured.size else np.nan,
        float(np.nanmin(low)) if measured.size else np.nan,
        float(np.nanmax(high)) if measured.size else np.nan,
    ]
    cells = [_number(value) for value in numbers]
    if digest.nonfinite[:, place].any():
        cells[-1] = Cell("NaN or inf", float("inf"), "num critical")
        if digest.nonfinite[-1, place]:
            cells[2] = Cell("NaN or inf", float("inf"), "num critical")
    return [
        Cell(words.visible(name), None, "name"),
        Cell(str(place + 1), place, "num"),
        Cell(words.visible(own[0].kind) if own else ""),
        Cell(str(len(own)), len(own), "num"),
        Cell(f"{sum(p.size for p in own):,d}", sum(p.size for p in own), "num"),
        *cells,
        _findings(found),
    ]


def _number(value: float) -> Cell:
    return Cell("–", float("nan"), "num") if np.isnan(value) else Cell(words.number(float(value)), float(value), "num")


def _findings(found: list[Finding]) -> Cell:
    if not found:
        return Cell("")
    rules = dict.fromkeys(words.visible(f.rule) for f in found)
    worst = max(found, key=lambda f: SEVERITIES.index(f.severity)).severity
    return Cell(f"{worst}: {', '.join(rules)}", None, worst)
