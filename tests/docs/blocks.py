"""The code blocks of the documentation, and how each kind is run.

Blocks of a page share names and a working directory, and are run from top to bottom. A comment `<!-- setup` ... `-->`
holds Python that a page takes for granted; readers do not see it. A block with a `title="train.py"` is also written to
that file; one with the title of a Keras backend runs on that backend alone.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gradwatch import cli
from tests.conftest import FRAMEWORKS
from tests.sizes import ROOT

PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
#: Commands that wait for a person, a server or the watched process; only their options are checked.
ENDLESS = {"serve", "watchdog", "alert-test", "demo"}
#: Programs of others, and of this repository's own development, that pages tell to run.
OTHERS = {
    "nox",
    "ssh",
    "curl",
    "cd",
    "git",
    "export",
    ".ci/run",
    ".venv/bin/pre-commit",
    "jupyter",
    "twine",
    "tensorboard",
}
#: Title of a block to the one backend of Keras that it is for.
BACKENDS = {"TensorFlow": "tensorflow", "PyTorch": "torch", "JAX": "jax"}
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<more>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A code block.

    Args:
        language: As the fence says; `python` for a setup.
        code: Without the indentation of the fence.
        line: Of the page, on which the code begins; from 1.
        title: What the fence calls it, often a file to be saved; empty for none.
    """

    language: str
    code: str
    line: int
    title: str = ""


def blocks(page: Path, language: str = "") -> list[Block]:
    """The code blocks of a page, of one language or all."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        code = match["setup"] or re.sub(rf"^{match['indent']}", "", match["code"] or "", flags=re.MULTILINE)
        title = re.search(r'title="([^"]+)"', match["more"] or "")
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match["language"] or "python", code, line, title[1] if title else ""))
    return [block for block in found if language in ("", block.language)]


def packages(page: Path) -> set[str]:
    """The packages that the Python blocks of a page import."""
    found = set().union(*(packages_of(block.code) for block in blocks(page, "python")))
    return found | {"torch"} if "tests.docs.training" in page.read_text(encoding="utf-8") else found


def packages_of(code: str) -> set[str]:
    """The packages that Python code imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def framework_marks(needed: set[str]) -> list[pytest.MarkDecorator]:
    """What a test is marked with that needs these packages."""
    return [pytest.mark.framework(name) for name, package in FRAMEWORKS.items() if package in needed]


def run_page(page: Path) -> None:
    """Run the blocks of a page in the working directory."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.title in BACKENDS and BACKENDS[block.title] != os.environ.get("KERAS_BACKEND"):
            continue
        if "." in block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
        if included := re.match(r'--8<-- "(.*)"', block.code):
            assert (ROOT / included[1]).exists()  # tests/test_examples.py runs it
        elif block.language == "python":
            # The empty lines let a traceback name the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)  # noqa: S102 -- our own code
        elif block.language in ("sh", "console"):
            for command in commands(block):
                run_command(command)


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, as words; in `console` only lines after a `$` are commands."""
    joined = block.code.replace("\\\n", " ")
    for line in joined.splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def run_command(words: list[str]) -> None:
    """Run a command of gradwatch, and see that those of others name what exists."""
    program, *arguments = words
    if program == "gradwatch":
        if arguments[0] in ENDLESS:
            _parse(arguments)
        else:
            assert cli.main(arguments) in (0, 1), words
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in arguments if "=" not in word]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), words
    elif program == "pip":
        extras = set(re.findall(r"[\w]+", "".join(re.findall(r"\[(.*?)\]", " ".join(arguments)))))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extras <= project["optional-dependencies"].keys(), words
    elif program in ("python", ".venv/bin/python") and arguments[0].endswith(".py"):
        assert Path(arguments[0]).exists() or (ROOT / arguments[0]).exists(), words
    elif program in ("python", ".venv/bin/python") and arguments[0] == "-m":
        pass  # programs that take minutes: pytest, the benchmarks
    else:
        assert program in OTHERS, words


def _parse(arguments: list[str]) -> None:
    import typer

    command = typer.main.get_command(cli.app)
    name, *rest = arguments
    with command.make_context("gradwatch", arguments) as context:
        inner = command.get_command(context, name)  # type: ignore[attr-defined]  # a group
        inner.make_context(name, rest, parent=context)
