"""Write what the documentation takes from the code: thresholds and sources, the tour of the files, the lessons.

`python docs/scripts/reference.py` renews each part between `<!-- from the code: ... -->` and `<!-- end -->`. A test
holds the pages to what this would write, so that no number can grow stale.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gradwatch import actions  # noqa: E402 -- the checkout, also where only the package is installed
from gradwatch.detectors import CATALOGUE  # noqa: E402
from tests import test_structure as structure  # noqa: E402

_PART = re.compile(r"(<!-- from the code: (\w+) ?([\w ]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
#: Tools of the short table of overheads.
_BRIEF = (
    "plain again", "clip_grad_norm_", "gradwatch, record + detect", "gradwatch, record + detect + Clip",
    "Lightning grad_norm, CSVLogger", "Composer OptimizerMonitor", "Ignite GradsScalarHandler",
    "wandb.watch (offline)", "TrainScope", "PulseGrad, k=1",
)  # fmt: skip
_SECTION = re.compile(r"^(Args|Examples|Attributes|Raises):$", re.MULTILINE)


def renewed(text: str) -> str:
    """A page with every generated part as the code says it today."""
    return _PART.sub(lambda m: f"{m[1]}\n{_PARTS[m[2]](m[3])}\n\n{m[4]}", text)


def rules(_: str) -> str:
    """All rules, and what they see in a sentence."""
    seen = {name: " ".join(sections(cls)[0].split("\n\n")[0].split()) for name, cls in CATALOGUE.items()}
    rows = [f"| [`{name}`](rules/{name}.md) | {words} |" for name, words in seen.items()]
    return "\n".join(["| rule | sees |", "| --- | --- |", *rows])


def rule(name: str) -> str:
    """What a rule sees, its thresholds, its known false alarms."""
    cls = CATALOGUE[name]
    text, arguments, rest = sections(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    rows = [
        f"| `{argument}` | {fields[argument].default:g} | {fields[argument].metadata['words']} | {words} |"
        for argument, words in arguments.items()
    ]
    table = ["| threshold | default | allowed | meaning and source |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([text, "", *table, "", rest])


def action(name: str) -> str:
    """What an action does, and its arguments with their defaults."""
    cls = getattr(actions, name)
    text, arguments, rest = sections(cls)
    # A clip has no default: exactly one of its limits must be given.
    defaults = cls().config() if name != "Clip" else dict.fromkeys(arguments)
    arguments.pop("common", None)
    rows = [f"| `{argument}` | `{_shown(defaults[argument])}` | {words} |" for argument, words in arguments.items()]
    more = [f"`{n}={_shown(v)}`" for n, v in defaults.items() if n not in arguments and n != "common"]
    table = ["| argument | default | meaning |", "| --- | --- | --- |", *rows] if rows else []
    every = [f"As every remedy between steps: {', '.join(more)}.", ""] if more else []
    return "\n".join([text, "", *table, *([""] if rows else []), *every, rest]).strip()


def imports(_: str) -> str:
    """What each part of the package imports from the others, in the rows of the architecture."""
    edges: dict[str, set[str]] = defaultdict(set)
    for file in structure.FILES:
        unit = structure.unit_of(structure.module_of(file))
        edges[unit] |= {structure.unit_of(module) for module in structure.imports(file)} - {unit}
    lines = []
    for number, row in enumerate(structure.ROWS, 1):
        lines += [f"{number:>2}  {unit:<15} {', '.join(sorted(edges[unit]))}".rstrip() for unit in row]
    return "\n".join(["```text", *lines, "```"])


def files(folder: str) -> str:
    """Every file of a folder of the package, in the first sentence of its docstring; without a folder, those on top."""
    home = structure.sizes.PACKAGE / folder
    found = home.glob("*.py") if not folder else home.rglob("*.py")
    rows = ["| file | what it is for |", "| --- | --- |"]
    for file in sorted(found):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows.append(f"| `{file.relative_to(home)}` | {' '.join(docstring.partition(chr(10) * 2)[0].split())} |")
    return "\n".join(rows)


def lesson(title: str) -> str:
    """A table that the notebook of the gradient lessons printed, by the beginning of its title."""
    notebook = json.loads((ROOT / "notebooks" / "gradient_lessons.ipynb").read_text(encoding="utf-8"))
    printed = [
        "".join(output["data"]["text/markdown"])
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    return next(table for table in printed if table.startswith(f"**{title}"))


def overhead(extent: str) -> str:
    """Processor time of a step with each tool over that of the plain loop, as last measured; `brief` shows some."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "overhead.json").read_text(encoding="utf-8"))
    tables = [table for table in measured["tables"] if (table["threads"], table["dtype"]) == (1, "float32")]
    rows = ["| | " + " | ".join(table["model"] for table in tables) + " |", "| --- |" + " ---: |" * len(tables)]
    steps = (f"{1e3 * np.median(table['rounds']['plain again']['plain_wall']):.3g} ms" for table in tables)
    rows.append(f"| a step of the plain loop | {' | '.join(steps)} |")
    for tool in _BRIEF if extent == "brief" else tables[0]["summary"]:
        found = [table["summary"][tool] for table in tables]
        ratios = ("–" if "error" in each else f"{each['processor']:.{2 + (each['processor'] < 2)}f}" for each in found)
        rows.append(f"| {tool}{_version(tool, measured['peers'])} | {' | '.join(ratios)} |")
    machine, rounds = measured["machine"], len(tables[0]["rounds"]["plain again"]["plain_wall"])
    caption = f"{machine['date'][:10]}, {machine['processor']}, one thread, float32, medians of {rounds} rounds."
    return "\n".join([*rows, "", caption])


def _version(tool: str, versions: dict[str, str]) -> str:
    return f" ({versions[tool]})" if tool in versions else ""


def sections(cls: type) -> tuple[str, dict[str, str], str]:
    """The docstring of a class: its text, its arguments, and what follows them up to the examples."""
    doc = inspect.getdoc(cls) or ""
    head, *more = re.split(r"^Args:$", doc, maxsplit=1, flags=re.MULTILINE)
    body = _SECTION.split(more[0])[0] if more else ""
    lines = body.strip("\n").splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    arguments: dict[str, str] = {}
    name = ""
    for line in lines[:end]:
        if found := re.match(r" {4}(\w+): (.*)", line):
            name = found[1]
            arguments[name] = found[2]
        elif line.strip():
            arguments[name] += f" {line.strip()}"
    return _SECTION.split(head)[0].strip(), arguments, "\n".join(lines[end:]).strip()


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, (tuple, list)) else repr(value)


_PARTS = {
    "rules": rules, "rule": rule, "action": action, "imports": imports, "files": files, "lesson": lesson,
    "overhead": overhead,
}  # fmt: skip


def main() -> None:
    """Renew all pages."""
    for page in [*ROOT.glob("README*.md"), *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
