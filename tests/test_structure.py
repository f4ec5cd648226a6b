"""The shape of the code: what imports what, how large things are, and what no file may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests import sizes

#: A file imports only from rows above its own, and from its own folder. A folder stands for all its files, except for
#: those with a row of their own.
ROWS = (
    ("errors", "json_types", "redaction"),
    ("records", "faults"),
    ("actions.base", "detectors.base", "remedies", "rows", "probes", "provenance", "storage"),
    ("diagnosis",),
    ("writer", "reader", "detectors", "actions", "alerts", "sinks"),
    ("backends",),
    ("monitor", "reporters", "compact", "export", "imports"),
    ("run", "settings", "watchdog", "at_exit"),
    ("watcher",),
    ("integrations",),
    ("watch", "preflight", "keras"),
    ("heal", "demo", "testing"),
    ("demo_keras", "cli_choices"),
    ("cli",),
    ("__init__", "__main__"),
)
#: What may be imported at the top of a file that `import gradwatch` or a watcher loads.
FRAMEWORKS = {
    "torch", "tensorflow", "keras", "jax", "lightning", "transformers", "accelerate", "ignite", "skorch", "fastai",
    "optax", "deepspeed",
}  # fmt: skip
#: Declared name to the name in `import`, where they differ.
IMPORTED_AS = {"pillow": "PIL", "pytorch_ignite": "ignite", "mlflow_skinny": "mlflow"}
#: What a declared package was called before.
OLDER_NAMES = {"pytorch_lightning"}
#: Where a framework may be imported at the top: these files are loaded only once it is in use.
FRAMEWORK_FILES = ("backends/", "integrations/", "remedies", "preflight", "heal", "demo", "testing")

FILES = sorted(path.relative_to(sizes.PACKAGE).as_posix() for path in sizes.PACKAGE.rglob("*.py"))
ROW_OF = {unit: row for row, units in enumerate(ROWS) for unit in units}


def unit_of(module: str) -> str:
    """The row table's word for a dotted module below gradwatch: the file itself or its top folder."""
    return module if module in ROW_OF else module.partition(".")[0] or "__init__"


def module_of(file: str) -> str:
    """`detectors/base.py` is `detectors.base`; a folder's `__init__` is the folder."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def walk_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING`, which are annotations and no dependencies."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from walk_at_run_time(child)


def names_imported(file: str) -> Iterator[str]:
    """The dotted names that a file imports, at its top or inside a function."""
    for node in walk_at_run_time(ast.parse((sizes.PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(file: str) -> set[str]:
    """Modules of gradwatch, without the first part, that a file imports."""
    modules = {module_of(other) for other in FILES}
    inner = {name.removeprefix("gradwatch.") for name in names_imported(file) if name.startswith("gradwatch.")}
    return {name if name in modules else name.rpartition(".")[0] for name in inner} - {module_of(file)}


@pytest.mark.parametrize("file", FILES)
def test_every_file_stands_in_a_row(file: str) -> None:
    assert unit_of(module_of(file)) in ROW_OF, f"gradwatch/{file}: add it to ROWS, in the row where it belongs"


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_rows_above_its_own(file: str) -> None:
    unit = unit_of(module_of(file))
    wrong = [
        imported
        for imported in sorted(imports(file))
        if unit_of(imported) != unit and ROW_OF[unit_of(imported)] >= ROW_OF[unit]
    ]

    assert wrong == []


def test_the_imports_have_no_cycle() -> None:
    try:
        TopologicalSorter({module_of(file): imports(file) for file in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_relative_imports_are_not_used() -> None:
    relative = [
        file
        for file in FILES
        for node in ast.walk(ast.parse((sizes.PACKAGE / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]

    assert relative == []


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(FRAMEWORK_FILES)])
def test_the_core_imports_no_framework(file: str) -> None:
    assert {name.partition(".")[0] for name in names_imported(file)} & FRAMEWORKS == set()


@pytest.mark.parametrize("file", FILES)
def test_every_package_that_is_imported_is_declared(file: str) -> None:
    project = tomllib.loads((sizes.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\[<>=]", word)[0].replace("-", "_") for group in groups for word in group}
    declared |= {IMPORTED_AS.get(name, name) for name in declared} | sys.stdlib_module_names
    imported = {name.partition(".")[0] for name in names_imported(file)} - OLDER_NAMES

    assert imported - declared == set()


def test_no_module_is_called_utils() -> None:
    assert [file for file in FILES if re.search(r"(utils?|helpers?|common|misc)\.py$", file)] == []


@pytest.mark.parametrize("budget", list(sizes.measure()), ids=lambda budget: budget.what)
def test_sizes_keep_to_the_budget(budget: sizes.Budget) -> None:
    assert budget.broken(sizes.measure()[budget]) == []


#: Written in pieces, so that this file does not say what it forbids.
FORBIDDEN = re.compile(
    "|".join((
        r"files\.python" + r"hosted",
        r"py" + r"pi\.org",
        r"registry\.np" + r"mjs",
        r"--(extra-)?index" + r"-url",
        r"--find" + r"-links",
        r"file:" + r"//",
        r"(?<![\w.])/(work|home|opt|root|Users)" + r"/\w",
    ))
)  # fmt: skip


def test_no_file_names_a_package_registry_or_a_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607 -- git is found where the developer has it
        cwd=sizes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = sizes.ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            lines = content.decode("utf-8", errors="replace").splitlines()
            found += [f"{name}:{i}: {line[:100]}" for i, line in enumerate(lines, 1) if FORBIDDEN.search(line)]

    assert found == []
