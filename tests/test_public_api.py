"""What `import gradwatch` gives, and what it costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from typing import Any

import pytest

import gradwatch
from tests.sizes import PACKAGE

HEAVY = ("numpy", "pandas", "pyarrow", "matplotlib", "plotly", "rich", "torch", "tensorflow", "keras", "jax")


def in_a_new_process(code: str) -> Any:
    """The JSON that `code` prints, run by an interpreter that has imported nothing yet."""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(printed.stdout)


def test_the_public_names_are_sorted() -> None:
    assert gradwatch.__all__ == sorted(gradwatch.__all__)


def test_every_public_name_has_a_home_and_every_home_a_public_name() -> None:
    assert sorted([*gradwatch._HOMES, *gradwatch._MODULES]) == gradwatch.__all__


def test_type_checkers_see_the_public_names_in_their_homes() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    hinted = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: (home, name) for name, home in gradwatch._HOMES.items()}
    modules = {name: tuple(home.rsplit(".", 1)) for name, home in gradwatch._MODULES.items()}

    assert hinted == homes | modules


@pytest.mark.parametrize("name", gradwatch.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(gradwatch, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gradwatch' has no attribute 'wacht'"):
        gradwatch.wacht  # type: ignore[attr-defined]  # noqa: B018 -- reading it is the test, for mypy too


def test_dir_lists_the_public_names() -> None:
    assert dir(gradwatch) == sorted([*gradwatch.__all__, "__version__"])


def test_a_public_function_survives_the_import_of_a_module_of_its_name() -> None:
    code = """
import importlib, json, pathlib, types, gradwatch
root = pathlib.Path(gradwatch.__file__).parent
for home in set(gradwatch._HOMES.values()):
    importlib.import_module(home)
print(json.dumps([name for name in gradwatch._HOMES if isinstance(getattr(gradwatch, name), types.ModuleType)]))
"""
    assert in_a_new_process(code) == []


def test_importing_gradwatch_imports_nothing_large() -> None:
    code = f"import gradwatch, json, sys; print(json.dumps(sorted(set({HEAVY}) & sys.modules.keys())))"

    assert in_a_new_process(code) == []


def test_importing_gradwatch_loads_none_of_its_own_modules() -> None:
    code = "import gradwatch, json, sys; print(json.dumps([m for m in sys.modules if m.startswith('gradwatch.')]))"

    assert in_a_new_process(code) == []
