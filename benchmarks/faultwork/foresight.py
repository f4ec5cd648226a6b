"""What the code says of a call by how it is written: that it is the user's own, passed on, or that its failure is met.

Read from the source, so that nothing is listed by hand.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

#: By these names gradwatch calls what the user, or the framework on the user's behalf, called through it: such a call
#: fails in an unwatched training just so, and its failure is the user's to hear.
PASSED_ON = {"original", "_original", "closure"}
#: Handlers of these catch whatever comes.
_BLANKET = (Exception, BaseException)

Span = tuple[int, int, int, int]


@functools.cache
def read_ahead(package: str) -> None:
    """Read all files below a folder now, for within a trace function Python cannot always parse."""
    for path in Path(package).rglob("*.py"):
        for reader in (passed_on, descriptors, _guarded):
            reader(str(path))


@functools.cache
def passed_on(file: str) -> frozenset[Span]:
    """Where in the file calls of the user's own are: line, end line, column, end column."""
    return _calls(file, lambda name: name.rpartition(".")[2] in PASSED_ON)


@functools.cache
def descriptors(file: str) -> frozenset[Span]:
    """Where in the file a bare descriptor is opened: of one that an interrupt loses on the way nobody can let go."""
    return _calls(file, lambda name: name == "os.open")


def _calls(file: str, is_meant: Callable[[str], bool]) -> frozenset[Span]:
    calls = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Call)]
    return frozenset(_span(node) for node in calls if is_meant(ast.unparse(node.func)))


def _span(node: ast.Call) -> Span:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def is_foreseen(frame: FrameType | None, package: str, error: type[BaseException]) -> bool:
    """Whether the first handler that such an error meets on its way out names it, and goes on without it.

    Args:
        frame: Where it is raised.
        package: Where files whose handlers count begin.
        error: Of which class.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith(package):
            for kinds in _handlers(frame):
                if issubclass(error, kinds):
                    return not set(kinds) & set(_BLANKET)
        frame = frame.f_back
    return False


def _handlers(frame: FrameType) -> Iterator[tuple[type[BaseException], ...]]:
    """What the handlers around the present line of a frame catch, from the inside."""
    for first, last, names in _guarded(frame.f_code.co_filename):
        if frame.f_code.co_firstlineno <= first <= frame.f_lineno <= last:
            kinds = eval(names, frame.f_globals)  # noqa: S307 -- of our own source
            yield kinds if isinstance(kinds, tuple) else (kinds,)


@functools.cache
def _guarded(file: str) -> tuple[tuple[int, int, str], ...]:
    """First and last line of what is guarded, and the expression that says against what; the innermost first."""
    found = []
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.Try):
            kinds = [handler.type for handler in node.handlers if not _passes(handler)]
            span = node.body[0].lineno, node.body[-1].end_lineno or 0
        elif isinstance(node, ast.With):
            kinds, span = [_suppressed(item) for item in node.items], (node.lineno, node.end_lineno or 0)
        else:
            continue
        found += [(*span, ast.unparse(kind)) for kind in kinds if kind is not None]
    return tuple(sorted(found, key=lambda each: -each[0]))


def _passes(handler: ast.ExceptHandler) -> bool:
    """Whether it raises what it caught again."""
    return isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None


def _suppressed(item: ast.withitem) -> ast.expr | None:
    call = item.context_expr
    is_suppress = isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "suppress"
    return call.args[0] if is_suppress and isinstance(call, ast.Call) and call.args else None
