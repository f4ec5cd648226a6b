"""How large modules and functions are, against what the design allows. `make lint` prints the table."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gradwatch"
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Size:
    """One thing measured: where it is and how large."""

    where: str
    value: int


@dataclass(frozen=True)
class Budget:
    """A rule on sizes: the typical one (a quantile) and the largest one."""

    what: str
    quantile: float
    typical: int
    largest: int

    def row(self, sizes: Sequence[Size]) -> str:
        """One line of the table."""
        worst = max(sizes, key=lambda size: size.value)
        typical = f"p{self.quantile * 100:.0f} {self._typical(sizes):>4.0f} (<= {self.typical})"
        return f"{self.what:22} {len(sizes):>5}   {typical:18} max {worst.value:>4} (<= {self.largest})  {worst.where}"

    def broken(self, sizes: Sequence[Size]) -> list[str]:
        """What breaks the rule, in words."""
        wrong = [f"{s.where}: {s.value} {self.what}, allowed {self.largest}" for s in sizes if s.value > self.largest]
        if (typical := self._typical(sizes)) > self.typical:
            wrong.append(f"p{self.quantile * 100:.0f} of {self.what}: {typical:.0f}, allowed {self.typical}")
        return wrong

    def _typical(self, sizes: Sequence[Size]) -> float:
        values = sorted(size.value for size in sizes)
        if self.quantile == 0.5:
            return statistics.median(values)
        return values[min(int(self.quantile * len(values)), len(values) - 1)]


MODULE_LINES = Budget("lines of a module", quantile=0.5, typical=150, largest=400)
FUNCTION_LINES = Budget("lines of a function", quantile=0.97, typical=40, largest=60)
POSITIONAL = Budget("positional parameters", quantile=0.97, typical=5, largest=5)


def functions(tree: ast.Module) -> Iterator[tuple[FunctionNode, bool]]:
    """The functions of a module and whether each is a method (of an instance or a class)."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FunctionNode):
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in child.decorator_list)
                yield child, isinstance(node, ast.ClassDef) and not static


def lines_of(function: FunctionNode) -> int:
    """Lines from the signature to the end, without the docstring."""
    docstring = ast.get_docstring(function, clean=False)
    end = function.end_lineno or function.lineno
    return end - function.lineno + 1 - (len(docstring.split("\n")) if docstring is not None else 0)


def measure(package: Path = PACKAGE) -> dict[Budget, list[Size]]:
    """All sizes in a package, by the budget that they are held against."""
    sizes: dict[Budget, list[Size]] = {MODULE_LINES: [], FUNCTION_LINES: [], POSITIONAL: []}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(package.parent).as_posix()
        # An `__init__` that holds one docstring says nothing about how long modules are.
        if path.name != "__init__.py" or text.count("\n") > 10:
            sizes[MODULE_LINES].append(Size(where, text.count("\n")))
        for function, is_method in functions(ast.parse(text)):
            at = f"{where}:{function.lineno} {function.name}"
            positional = len(function.args.posonlyargs) + len(function.args.args) - is_method
            sizes[FUNCTION_LINES].append(Size(at, lines_of(function)))
            sizes[POSITIONAL].append(Size(at, positional))
    return sizes


def main() -> int:
    """Print the table; 1 when a rule is broken."""
    wrong = []
    for budget, sizes in measure().items():
        print(budget.row(sizes))
        wrong += budget.broken(sizes)
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
