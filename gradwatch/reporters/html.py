"""The report: one HTML file that needs nothing else, works offline and under a strict content-security policy."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.reporters import words
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.layer_table import COLUMNS, Cell, layer_rows
from gradwatch.reporters.page_data import CELLS, page_data
from gradwatch.reporters.preflight import layer_cells
from gradwatch.reporters.story import Chapter
from gradwatch.reporters.summary import Summary, summarize
from gradwatch.reporters.templating import asset, environment, image, plotly_js, policy, script_json
from gradwatch.reporters.text import SIGNS

if TYPE_CHECKING:
    from gradwatch.reader import RunReader

MOST_FINDINGS, MOST_ACTIONS, MOST_LAYERS = 100, 200, 700
#: Rows of the layer table where there are more layers: the charts of wide models need the room.
TELLING = 250
#: Columns of the heatmap, at least and at most.
COLUMN_RANGE = (16, 800)
#: How many steps around the onset are shown in full, at most; three eighths of them before it.
CLOSE_UP = 400


def report(run: RunReader) -> str:
    """The report of a run as HTML.

    Args:
        run: A run; also one that is still being written, has crashed or is empty.

    Returns:
        A whole page of at most about 6 MB, most of which is plotly.js.
    """
    summary, digest = summarize(run), _digest(run)
    context = _told(summary, digest)
    if context["drawn"]:
        context |= _drawn(summary, digest, _close_up(run, summary, digest)) | _pictures(summary, digest)
        context |= {"plotly": plotly_js(), "script": asset("page.js")}
    scripts = [context["plotly"], context["script"]] if context["drawn"] else []
    return environment().get_template("report.html").render(context, css=asset("page.css"), policy=policy(scripts))


def live_page(run: RunReader, *, name: str, version: str) -> str:
    """The report as a page of `gradwatch serve`: it loads its scripts, leaves out still pictures, and renews itself.

    Args:
        run: A run.
        name: Under which the server knows it.
        version: Of what is shown; the page asks until there is another.
    """
    summary, digest = summarize(run), _digest(run)
    context = _told(summary, digest) | {"live": name, "live_version": version}
    if context["drawn"]:
        context |= _drawn(summary, digest, _close_up(run, summary, digest))
    return environment().get_template("report.html").render(context)


def _digest(run: RunReader) -> Digest:
    layers = len({p.layer for p in run.info.parameters})
    return Digest.of(run, int(np.clip(CELLS // max(1, layers), *COLUMN_RANGE)))


def _close_up(run: RunReader, summary: Summary, digest: Digest) -> Digest | None:
    """Every step around the onset, where the whole picture has several steps to a column."""
    if summary.root is None or not len(digest) or (digest.first == digest.last).all():
        return None
    width = int(np.clip(CELLS // 2 // max(1, len(digest.layers)), COLUMN_RANGE[0], CLOSE_UP))
    start = max(0, summary.root.first_step - width * 3 // 8)
    return Digest.of(run, width, steps=slice(start, start + width))


def _told(summary: Summary, digest: Digest) -> dict[str, Any]:
    """What the page says in words."""
    return {
        "s": summary, "signs": SIGNS, "now": time.time(), "exact": digest.exact,
        "drawn": bool(len(digest) and digest.layers), "live": None, "pictures": [], "depth_picture": None,
        "findings": [_finding(c, summary) for c in summary.chapters[:MOST_FINDINGS]],
        "hidden_findings": max(0, len(summary.chapters) - MOST_FINDINGS),
        "actions": summary.actions[:MOST_ACTIONS],
        "hidden_actions": max(0, len(summary.actions) - MOST_ACTIONS),
        "config": _indented({k: v for k, v in summary.info.config.items() if k != "preflight"}),
        "preflight": _preflight(summary.info.config.get("preflight")),
    }  # fmt: skip


def _drawn(summary: Summary, digest: Digest, closeup: Digest | None) -> dict[str, Any]:
    """The charts' data and the layer table."""
    rows = layer_rows(digest, summary.info.parameters, summary.findings)
    shown = rows if len(rows) <= MOST_LAYERS else _most_telling(rows)
    count = words.plural(len(digest.layers), "layer")
    return {
        "alt": f"Gradient norm of {count} over the steps. {summary.verdict.headline}",
        "depth_alt": f"Gradient norm of {count} over depth at chosen steps.",
        "closeup": closeup is not None,
        "layers": shown, "layer_columns": COLUMNS, "hidden_layers": len(rows) - len(shown),
        "data": script_json(page_data(summary, digest, closeup)),
    }  # fmt: skip


def _pictures(summary: Summary, digest: Digest) -> dict[str, Any]:
    """Still pictures: what is seen first, in print, and where scripts are forbidden."""
    from gradwatch.reporters.figures import depth_profile, heatmap, timeline

    marked = (summary.chapters, summary.actions)
    first = heatmap(digest, *marked, root=summary.root)
    second = timeline(digest, *marked, root=summary.root)
    third = depth_profile(digest, root=summary.root)
    return {
        "pictures": [
            image(first, f"Heatmap of gradient norms, layers against steps. {summary.verdict.headline}"),
            image(second, "Loss, global gradient norm and learning rate over the steps."),
        ],
        "depth_picture": image(third, "Gradient norm over the depth of the model at chosen steps."),
    }


def _most_telling(rows: list[list[Cell]]) -> list[list[Cell]]:
    """Layers with findings first, as many as are shown."""
    return sorted(rows, key=lambda row: not row[-1].text)[:TELLING]


def _finding(chapter: Chapter, summary: Summary) -> dict[str, Any]:
    lead = chapter.lead
    n_layers = len({p.layer for p in summary.info.parameters})
    value = f"{words.number(lead.value)} (threshold {words.number(lead.threshold)})" if lead.value == lead.value else ""
    rows = (
        ("what", words.visible(lead.message)),
        ("value", value),
        ("layers", words.listing(chapter.layers, most=12)),
        ("parameters", words.listing(lead.parameters, most=6)),
        ("evidence", ", ".join(f"{words.visible(str(k))} = {_value(v)}" for k, v in lead.evidence.items())),
        ("cause", words.visible(lead.cause)),
        ("advice", "; ".join(words.visible(a) for a in lead.advice)),
    )
    title = " ".join(filter(None, (chapter.phrase, chapter.where(n_layers))))
    shown = [(name, text) for name, text in rows if text]
    is_told = chapter is summary.root or (summary.root is None and chapter is summary.chapters[0])
    return {"severity": chapter.severity, "title": title, "when": chapter.when(), "rows": shown, "open": is_told}


def _value(value: Any) -> str:
    if isinstance(value, float):
        return words.number(value)
    return words.visible(value if isinstance(value, str) else json.dumps(value, default=str))


def _indented(config: Mapping[str, Any]) -> str:
    return "\n".join(map(words.visible, json.dumps(config, indent=2, default=str).splitlines())) if config else ""


def _preflight(found: Any) -> dict[str, Any] | None:
    """What stood before the training: the verdict in words and a table of layers."""
    if not isinstance(found, Mapping):
        return None
    where = f" at {words.shorten(str(found['where']), 64)}" if found.get("where") else ""
    told = (
        ("verdict", f"{found.get('verdict', '')}{where}"),
        ("cause", found.get("cause", "")),
        ("advice", "; ".join(map(str, found.get("advice", ())))),
        ("without gradient", words.listing([str(name) for name in found.get("unused", ())], most=6)),
    )
    head, rows = layer_cells(found)
    shown = [(name, words.visible(str(text))) for name, text in told if text]
    return {"rows": shown, "head": head, "layers": [[words.visible(cell) for cell in row] for row in rows]}
