"""Every public method is documented, and every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from tests import conftest
from tests.sizes import PACKAGE

#: Framework to the files that need it to be imported; the core needs none.
NEEDS = {
    "torch": ("torch*.py",),
    "keras": ("keras*.py",),
    "lightning": ("lightning.py",),
    "transformers": ("transformers.py", "accelerate.py"),
    "ignite": ("ignite.py",),
    "skorch": ("skorch.py",),
    "optax": ("optax*.py", "jax*.py"),
}
#: The same for the extras of `tests/extras.py`.
NEEDS_EXTRA = {"fastai": ("integrations/fastai.py",), "deepspeed": ("deepspeed*.py",)}

FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"]


def parameter(path: Path) -> object:
    """The file as a test parameter that belongs to the frameworks it needs."""
    relative = path.relative_to(PACKAGE)

    def needed(table: Mapping[str, tuple[str, ...]]) -> list[str]:
        return [name for name, patterns in table.items() if any(relative.match(pattern) for pattern in patterns)]

    marks = [pytest.mark.framework(name) for name in needed(NEEDS)]
    marks += [pytest.mark.needs(name) for name in needed(NEEDS_EXTRA)]
    return pytest.param(path, marks=marks, id=relative.as_posix())


@pytest.fixture(params=[parameter(path) for path in FILES])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """Each module of the package in turn."""
    path: Path = request.param
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that the module imports
        return importlib.import_module(name)


def test_the_examples_of_a_module_run(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)

    assert result.failed == 0


def test_public_methods_are_documented_where_they_stand_or_in_the_base_class(module: ModuleType) -> None:
    bare = [
        f"{cls.__name__}.{name}"
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
        for name, member in vars(cls).items()
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property))
        if not inspect.getdoc(getattr(cls, name))
    ]

    assert bare == []


def test_every_framework_under_test_says_which_files_need_it() -> None:
    assert conftest.FRAMEWORKS.keys() <= NEEDS.keys()
