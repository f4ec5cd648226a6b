"""What every test stands on: one thread, fixed seeds, the frameworks under test, and nothing left behind."""

from __future__ import annotations

import os

# Before any framework starts its thread pools and any figure opens a window.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg")

import ast
import gc
import importlib.metadata
import importlib.util
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import hypothesis
import numpy as np
import pytest

from benchmarks.faultwork.descriptors import open_files

pytest_plugins = ("tests.extras",)

#: What GRADWATCH_TEST_FRAMEWORKS may name, and the package that must then be there.
FRAMEWORKS = {
    "torch": "torch",
    "lightning": "lightning",
    "transformers": "transformers",
    "ignite": "ignite",
    "skorch": "skorch",
    "optax": "optax",
}
#: Where the distribution has another name than the package.
DISTRIBUTIONS = {"ignite": "pytorch-ignite"}

hypothesis.settings.register_profile("gradwatch", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("gradwatch")


def _frameworks_under_test() -> tuple[str, ...]:
    """The frameworks named in the environment, by default all; "none" leaves the core alone.

    An unknown name or a missing package ends the run: what was asked for is tested or fails, never skipped in silence.
    """
    names = os.environ.get("GRADWATCH_TEST_FRAMEWORKS") or ",".join(FRAMEWORKS)
    chosen = () if names == "none" else tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in FRAMEWORKS:
            raise pytest.UsageError(f"GRADWATCH_TEST_FRAMEWORKS: unknown framework {name!r}. Known: {[*FRAMEWORKS]}")
        if importlib.util.find_spec(FRAMEWORKS[name]) is None:
            raise pytest.UsageError(f"GRADWATCH_TEST_FRAMEWORKS: {name!r} is not installed")
    return chosen


#: Where code of ours lies, as opposed to that of packages.
OURS = tuple(f"{Path(__file__).parent.parent / folder}{os.sep}" for folder in ("gradwatch", "tests"))

CHOSEN = _frameworks_under_test()


def pytest_report_header() -> str:
    versions = [f"{name} {importlib.metadata.version(DISTRIBUTIONS.get(name, FRAMEWORKS[name]))}" for name in CHOSEN]
    return f"frameworks under test: {', '.join(versions) or 'none'}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A test file that imports a framework at its top belongs to it."""
    if collection_path.suffix != ".py":
        return None
    left_out = {package for name, package in FRAMEWORKS.items() if name not in CHOSEN}
    tree = ast.parse(collection_path.read_text(encoding="utf-8"))
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    return True if left_out & {name.partition(".")[0] for name in imported} else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if any(m.args[0] not in CHOSEN for m in item.iter_markers("framework"))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if any(item.get_closest_marker("cuda") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("cuda"):
                    item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a test may record a run; does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the state that user code and frameworks draw from
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """Fails a test after which a thread, an open file, a wrapped function or a global hook of ours remains (law 9)."""
    threads = set(threading.enumerate())
    yield
    left = [f"thread {thread.name!r}" for thread in _new_threads(threads)]
    left += [f"open file {path}" for path in _open_files(tmp_path)]
    left += wrapped_functions() + global_hooks()
    if left:
        pytest.fail("left behind: " + "; ".join(left))


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    # A `_DummyThread` is a native thread of a framework that once ran Python code; it cannot be joined.
    new = [t for t in threading.enumerate() if t not in before and not isinstance(t, threading._DummyThread)]
    return [thread for thread in new if thread.is_alive()]


def _open_files(folder: Path) -> list[str]:
    found = open_files(folder)
    if found:
        # A file object in a reference cycle is garbage, not a leak; only the second look counts.
        gc.collect()
        found = open_files(folder)
    return found


def wrapped_functions() -> list[str]:
    """Functions of torch that a watcher may wrap while it watches, and whose code is now ours."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    owners: list[Any] = [torch.nn.utils, torch.nn.utils.clip_grad, torch.amp.GradScaler, torch.cuda.amp.GradScaler]
    owners += [torch.autograd, torch.Tensor, torch.nn.Module, torch.optim.Optimizer]
    owners += [cls for cls in torch.optim.Optimizer.__subclasses__() if cls.__module__.startswith("torch.")]
    return [
        f"wrapped {owner.__name__}.{name}"
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, FunctionType) and value.__code__.co_filename.startswith(OURS)
    ]


def global_hooks() -> list[str]:
    """Hooks on every optimizer or module of the process."""
    owners = [sys.modules.get("torch.optim.optimizer"), sys.modules.get("torch.nn.modules.module")]
    return [
        f"global hook {owner.__name__}.{name}"
        for owner in owners
        if owner is not None
        for name, value in vars(owner).items()
        if name.startswith("_global_") and name.endswith("_hooks") and value
    ]
