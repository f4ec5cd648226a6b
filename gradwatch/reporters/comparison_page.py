"""A comparison of runs as HTML, Markdown, JSON, and in a terminal."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from gradwatch.reporters import words
from gradwatch.reporters.comparison import APART, Alignment, Parting
from gradwatch.reporters.comparison_data import charts
from gradwatch.reporters.figures.comparison import comparison
from gradwatch.reporters.templating import asset, environment, image, plotly_js, policy, script_json
from gradwatch.reporters.text import escaped, table

MOST_LAYERS = 1000


def render(compared: Alignment, format_name: str) -> str:
    """The comparison in a known format."""
    return {"html": html, "md": markdown, "json": to_json}[format_name](compared)


def html(compared: Alignment) -> str:
    """One self-contained page; where scripts are forbidden a still picture takes the place of the charts."""
    plotly, script = plotly_js(), asset("compare.js")
    alt = f"Loss, global norm and layer norms of {', '.join(map(words.visible, compared.names))}."
    context: dict[str, Any] = {
        "css": asset("page.css"), "policy": policy([plotly, script]), "now": time.time(), "c": compared,
        "rows": run_rows(compared), "partings": partings(compared), "picture": image(comparison(compared), alt),
        "layers": _layer_rows(compared), "plotly": plotly, "script": script, "data": script_json(charts(compared)),
    }  # fmt: skip
    return environment().get_template("compare.html").render(context)


def card(compared: Alignment) -> str:
    """The runs side by side, for a notebook."""
    return (
        environment()
        .get_template("compare_card.html")
        .render(rows=run_rows(compared), partings=partings(compared), c=compared)
    )


def markdown(compared: Alignment) -> str:
    """The comparison as Markdown."""
    head, rows = run_rows(compared)
    parts = ["# Runs compared", table(tuple(head), [tuple(escaped(cell) for cell in row) for row in rows])]
    parts += [escaped(line) for line in partings(compared)]
    return "\n\n".join(parts) + "\n"


def to_json(compared: Alignment) -> str:
    """The comparison as JSON."""
    layers = compared.layers()
    value = {
        "runs": [summary.to_json() for summary in compared.summaries],
        "partings": [
            {
                "runs": [compared.names[0], compared.names[other]],
                "first_difference": _parting(compared.first_difference(other=other)),
                "first_apart": _parting(compared.first_difference(1 - 1 / APART, other=other)),
            }
            for other in range(1, len(compared.runs))
        ],
        "layers": {
            str(n): {str(k): v if math.isfinite(v) else None for k, v in row.items()}
            for n, row in layers.T.to_dict().items()
        },
    }
    return json.dumps(value, indent=2, allow_nan=False, default=str) + "\n"


def run_rows(compared: Alignment) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of runs."""
    head = ["run", "verdict", "headline", "steps", "last loss", "skipped", "clipped", "own cost"]
    rows = []
    for name, s in zip(compared.names, compared.summaries, strict=True):
        n = s.numbers
        rows.append([
            words.visible(name), f"{s.verdict.sign} {s.verdict.word}", s.verdict.headline, words.step(n.steps),
            words.number(n.loss[1]) if n.loss else "–", words.step(n.skipped), words.step(n.clipped),
            "–" if n.overhead is None else words.percent(n.overhead),
        ])  # fmt: skip
    return head, rows


def partings(compared: Alignment) -> list[str]:
    """Where each run parts from the first, in words."""
    return [_parts(compared, other) for other in range(1, len(compared.runs))]


def _parts(compared: Alignment, other: int) -> str:
    first, second = words.visible(compared.names[0]), words.visible(compared.names[other])
    different = compared.first_difference(other=other)
    apart = compared.first_difference(1 - 1 / APART, other=other)
    if different is None:
        return f"{first} and {second} have the same gradient norms at all their common steps."
    said = f"{first} and {second} first differ at step {words.step(different.step)}, most in {_place(different)}."
    if apart is None:
        return f"{said} No layer's norms are ever more than a factor {words.number(APART)} apart."
    if apart.step == different.step:
        return said
    at = f"at step {words.step(apart.step)}, most in {_place(apart)}"
    return f"{said} They are first more than a factor {words.number(APART)} apart {at}."


def _place(parting: Parting) -> str:
    values = " against ".join(words.number(v) for v in parting.values)
    return f"{words.shorten(parting.layer, 64)} ({values})"


def _parting(parting: Parting | None) -> dict[str, Any] | None:
    if parting is None:
        return None
    values = [v if math.isfinite(v) else str(v) for v in parting.values]
    return {"step": parting.step, "layer": parting.layer, "values": values}


def _layer_rows(compared: Alignment) -> tuple[list[str], list[list[str]]]:
    layers = compared.layers()
    head = ["layer", *(words.visible(str(name)) for name in layers.columns)]
    rows = [
        [words.visible(str(name)), *("–" if math.isnan(v) else words.number(float(v)) for v in row)]
        for name, row in zip(layers.index, layers.to_numpy(), strict=True)
    ]
    return head, rows[:MOST_LAYERS]
