"""How many small faults in detectors and actions the tests notice: a mutation test on a random sample.

    python -m benchmarks.mutation --mutants 400            # measure; survivors go into the result
    python -m benchmarks.mutation --again                  # the survivors of the last result, after tests were added

The mutants are mutmut's (one operator, number, argument, comparison, assignment or string changed at a time), here also
in the bodies of classes, where thresholds stand; functions with a decorator are left out by mutmut. mutmut itself would
run them one by one in processes that load every framework anew, or all from one process that has run the tests before;
here each mutant is a fork of a process that has loaded the frameworks but nothing of gradwatch. Only the tests that
reach the mutated line run, quickest first, up to the first that fails. A mutant that no test reaches survives, and so
does one whose tests end at the limit; one that never ends or takes too much processor time is killed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import math
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg")
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # each of the forks would load them

import libcst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("gradwatch/detectors", "gradwatch/actions")
TESTS = ("tests/detectors", "tests/actions", "tests/test_diagnosis.py")
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
#: Loaded before the forks: what the tests need and what does not load gradwatch.
PRELOADED = (
    "numpy",
    "pandas",
    "pyarrow.parquet",
    "hypothesis.strategies",
    "hypothesis.extra.numpy",
    "torch._dynamo",
    "pytest_timeout",
)
#: Seconds of tests, by their time without a fault, that run at most for one mutant.
MOST_TESTS = 25.0
#: Seconds of processor time after which a mutant counts as one that never ends.
MOST_SECONDS = 120


@dataclass
class Mutant:
    """One fault: a file in which one node has another form."""

    file: str
    line: int
    before: str
    after: str
    changed: Callable[[], Any] = field(repr=False)
    verdict: str = ""
    by: str = ""


@dataclass
class Reach:
    """Which tests run which lines, and how long each takes."""

    lines: dict[str, dict[int, set[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def tests(self, mutant: Mutant) -> list[str]:
        """The tests that reach a mutant, quickest first: those of its statement, else of what is around it."""
        lines = self.lines.get(mutant.file, {})
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        around = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.stmt) and node.lineno <= mutant.line <= (node.end_lineno or 0)
        ]
        spans = [(mutant.line, mutant.line)]
        spans += sorted(((n.lineno, n.end_lineno or 0) for n in around), key=lambda span: span[1] - span[0])
        spans += [(1, len(text.splitlines()))]
        for first, last in spans:
            found = set().union(*(lines.get(line, set()) for line in range(first, last + 1)))
            if found:
                return sorted(found, key=lambda test: self.seconds.get(test, 0.0))
        return []


def mutants_of(file: Path) -> list[Mutant]:
    """All mutants of a file."""
    wrapper = MetadataWrapper(libcst.parse_module(file.read_text(encoding="utf-8")))
    visitor = MutationVisitor(mutation_operators, IgnoredCode(set(), set(), set()))
    wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)

    def mutant(mutation: Any) -> Mutant:
        before, after = mutation.original_node, mutation.mutated_node
        shown = [libcst.Module(body=[]).code_for_node(node) for node in (before, after)]
        changed = partial(wrapper.module.deep_replace, before, after)
        return Mutant(str(file.relative_to(ROOT)), positions[before].start.line, *shown, changed)

    return [mutant(mutation) for mutation in visitor.mutations]


class Contexts:
    """A pytest plugin: tells coverage which test is running, and takes the time of each."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        began = time.process_time()
        result = yield
        self.seconds[item.nodeid] += time.process_time() - began
        self.coverage.switch_context("")
        return result


class Only:
    """A pytest plugin: runs the given tests in the given order, and remembers the first that failed."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: i for i, test in enumerate(tests)}
        self.failed = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


class Loader(importlib.machinery.SourceFileLoader):
    """Loads other code for one module."""

    def __init__(self, name: str, path: str, code: str) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> Any:
        return compile(self.code, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Gives the mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.file.removesuffix(".py").replace("/", ".")
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        place = str(ROOT / self.mutant.file)
        return importlib.util.spec_from_file_location(
            fullname, place, loader=Loader(fullname, place, self.mutant.changed().code)
        )


def in_a_fork(work: Any) -> tuple[int, Any]:
    """What `work()` returns, from a process of its own, and the status with which that ended."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        pid = os.fork()
        if not pid:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS * 4, MOST_SECONDS * 4))
                os.environ["TMPDIR"] = tempfile.tempdir = folder
                for target in (1, 2):
                    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
                answer.write_text(json.dumps(work()))
            except BaseException:  # noqa: BLE001 -- whatever ends the fork is told, and the fork ends
                log.write_text(traceback.format_exc())
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found = json.loads(answer.read_text()) if answer.exists() else None
        if found is None and not os.WIFSIGNALED(status):
            print(log.read_text()[-2000:])
        return status, found


def pytest_main(paths: list[str], plugins: list[Any]) -> int:
    """Run tests without what would be left on the disk."""
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout", "-o", "timeout=0"]
    quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is loaded before
    with contextlib.redirect_stdout(io.StringIO()):
        return int(pytest.main([*quiet, *paths], plugins=plugins))


def reach() -> Reach:
    """Run all tests once and see which lines each of them runs."""

    def work() -> Any:
        import coverage

        with tempfile.TemporaryDirectory() as folder:
            watch = coverage.Coverage(data_file=f"{folder}/data", source=[str(ROOT / t) for t in TARGETS])
            watch.start()
            plugin = Contexts(watch)
            code = pytest_main(list(TESTS), [plugin])
            watch.stop()
            data = watch.get_data()
            lines: dict[str, dict[int, list[str]]] = {}
            for name in data.measured_files():
                by_line = data.contexts_by_lineno(name)
                lines[str(Path(name).relative_to(ROOT))] = {n: [c for c in cs if c] for n, cs in by_line.items()}
            return {"code": code, "lines": lines, "seconds": plugin.seconds}

    status, found = in_a_fork(work)
    if status or not found or found["code"]:
        sys.exit(f"the tests must pass before faults are put in: {found and found['code']}")
    lines = {file: {int(n): set(tests) for n, tests in of.items()} for file, of in found["lines"].items()}
    return Reach(lines, found["seconds"])


def judge(mutant: Mutant, known: Reach) -> None:
    """Run the tests that reach a mutant; sets its verdict."""
    tests, total = [], 0.0
    for test in known.tests(mutant):
        total += known.seconds.get(test, 0.0)
        if tests and total > MOST_TESTS:
            break
        tests.append(test)
    if not tests:
        mutant.verdict = "survived: no test reaches it"
        return

    def work() -> Any:
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
        sys.meta_path.insert(0, Finder(mutant))
        plugin = Only(tests)
        return pytest_main(sorted({test.partition("::")[0] for test in tests}), [plugin]), plugin.failed

    status, found = in_a_fork(work)
    if found is None:
        mutant.verdict = "killed: ended by the processor limit or a crash" if os.WIFSIGNALED(status) else "error"
    elif found[0] in (int(pytest.ExitCode.TESTS_FAILED), int(pytest.ExitCode.INTERRUPTED), 3, 4):
        mutant.verdict, mutant.by = "killed", found[1] or "could not be imported"
    else:
        mutant.verdict = "survived"


def check_control(file: Path, known: Reach) -> None:
    """A mutant that changes nothing must survive."""
    control = Mutant(str(file.relative_to(ROOT)), 1, "", "", partial(libcst.parse_module, file.read_text()))
    judge(control, known)
    if control.verdict != "survived":
        sys.exit(f"the control did not survive: {control.verdict} by {control.by}")


def interval(killed: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share (1927, JASA 22:209), for 95 % by default."""
    share = killed / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def show(mutants: list[Mutant], population: Counter[str]) -> dict[str, Any]:
    """Print the table and return the numbers of it."""
    by_file: dict[str, list[bool]] = defaultdict(list)
    for mutant in mutants:
        by_file[mutant.file].append(mutant.verdict.startswith("killed"))
    print(f"\n{'file':<42}{'mutants':>8}{'tried':>7}{'killed':>8}")
    for file in sorted(population):
        print(f"{file:<42}{population[file]:>8}{len(by_file[file]):>7}{sum(by_file[file]):>8}")
    total, killed = len(mutants), sum(sum(verdicts) for verdicts in by_file.values())
    low, high = interval(killed, total)
    print(f"{'all':<42}{population.total():>8}{total:>7}{killed:>8}")
    print(f"killed {killed / total:.1%} of the sample, 95 % interval [{low:.1%}, {high:.1%}]")
    return {"killed": killed, "share": killed / total, "interval": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=400, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="only the survivors of the last result")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    files = [file for target in TARGETS for file in sorted((ROOT / target).glob("*.py")) if file.stem != "__init__"]
    every = [mutant for file in files for mutant in mutants_of(file)]
    population = Counter(mutant.file for mutant in every)
    sample = random.Random(arguments.seed).sample(every, min(arguments.mutants, len(every)))  # noqa: S311 -- no secret
    last = json.loads(RESULT.read_text()) if arguments.again else {}
    if arguments.again:
        sample = random.Random(last["seed"]).sample(every, last["asked"])[: len(last["mutants"])]  # noqa: S311 -- no secret
        for mutant, old in zip(sample, last["mutants"], strict=True):
            if (mutant.file, mutant.before, mutant.after) != (old["file"], old["before"], old["after"]):
                sys.exit(f"{mutant.file} has changed since the last result: measure anew")
            mutant.verdict, mutant.by = (old["verdict"], old["by"]) if old["verdict"].startswith("killed") else ("", "")
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # what the forks share, they need not look through
    known = reach()
    print(f"{len(every)} mutants, {len(sample)} in the sample, {len(known.seconds)} tests", flush=True)
    check_control(files[-1], known)
    with contextlib.suppress(KeyboardInterrupt):  # what was tried by then is a random sample too
        for i, mutant in enumerate(sample):
            if not mutant.verdict:
                judge(mutant, known)
                told = f"{mutant.file}:{mutant.line}  {mutant.before!r} -> {mutant.after!r}"
                print(f"{i:4d} {mutant.verdict:<10} {told}", flush=True)
    sample = [mutant for mutant in sample if mutant.verdict]
    numbers = show(sample, population)
    kept = [{k: v for k, v in vars(mutant).items() if k != "changed"} for mutant in sample]
    result = {"machine": machine("mutmut", "torch", "pytest"), "seed": last.get("seed", arguments.seed), **numbers}
    result["asked"] = last.get("asked", arguments.mutants)
    RESULT.write_text(json.dumps({**result, "population": len(every), "mutants": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
