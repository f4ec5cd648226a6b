"""A hash of code, so that a run is trained again when what trains it has changed, and not when a comment has."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]


def of_function(function: Any, arguments: dict[str, Any]) -> str:
    """Hash of a function's code, of all functions and classes of the benchmarks that it uses, and of its arguments."""
    sources: dict[str, str] = {}
    _collect(function, sources)
    return _digest(*(f"{name} {source}" for name, source in sorted(sources.items())), repr(sorted(arguments.items())))


def of_modules(*modules: ModuleType) -> str:
    """Hash of the code of whole modules."""
    return _digest(*(_normal(inspect.getsource(module)) for module in modules))


def _collect(item: Any, sources: dict[str, str]) -> None:
    name = f"{item.__module__}.{item.__qualname__}"
    if name in sources:
        return
    source = textwrap.dedent(inspect.getsource(item))
    sources[name] = _normal(source)
    scope = vars(sys.modules[item.__module__])
    for node in ast.walk(ast.parse(source)):
        used = scope.get(node.id) if isinstance(node, ast.Name) else None
        is_ours = getattr(used, "__module__", "").partition(".")[0] == PACKAGE
        if is_ours and (inspect.isfunction(used) or inspect.isclass(used)):
            _collect(used, sources)


class _Bare(ast.NodeTransformer):
    """Takes away docstrings, and the decorators that label a scenario."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [d for d in node.decorator_list if not _is_label(d)]
        return super().generic_visit(node)


def _is_label(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") in ("healthy", "faulty")


def _normal(source: str) -> str:
    return ast.dump(_Bare().visit(ast.parse(source)))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
