"""The version matrix: `nox` runs a telling part of the tests with the oldest and the newest of what gradwatch takes.

    nox --list
    nox -s oldest "python-3.13"          # some; by default all, one after the other
    nox -s oldest -- tests/record -x     # other tests

Floors come from pyproject.toml, so that what it promises is what is tested. Wheels of PyTorch may bring CUDA along:
some gigabytes for each session that needs one.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "uv|venv"  # uv where it is installed: it unpacks gigabytes sooner
PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: The versions that the ordinary tests run with.
TORCH = "torch==2.13.0"
TESTS = ("tests/torch", "tests/record", "tests/detectors", "tests/actions", "tests/reporters", "tests/test_watcher.py")
#: pyarrow left numpy 1 behind without saying so in its requirements.
NUMPY_1 = ("numpy<2", "pandas<3", "pyarrow<22")
TOOLS = ("pytest", "pytest-timeout", "hypothesis")


def floors(*extras: str) -> list[str]:
    """The oldest versions that pyproject.toml allows, of what gradwatch always needs and of some extras."""
    words = [*PROJECT["dependencies"], *(word for extra in extras for word in EXTRAS[extra])]
    return [re.sub(r">=([\d.]+)", r"==\1.*", word) for word in words]


def run(
    session: nox.Session,
    *packages: str,
    tests: tuple[str, ...] = TESTS,
    options: tuple[str, ...] = (),
    **environment: str,
) -> None:
    """Install gradwatch beside these versions and run the tests."""
    session.install("--quiet", *packages, *TOOLS, "hatchling", "editables")
    session.install("--quiet", "--no-build-isolation", "--no-deps", "--editable", ".")
    frameworks = "torch" if any(package.startswith("torch") for package in packages) else "none"
    session.run(
        *("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-o", "timeout=600"),
        *options,
        *(session.posargs or tests),
        env={"GRADWATCH_TEST_FRAMEWORKS": frameworks, "OMP_NUM_THREADS": "1", **environment},
    )


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """Every floor at once: PyTorch, numpy, pandas, pyarrow, matplotlib and the rest."""
    # Old matplotlib and typer call what new pyparsing and click are about to drop.
    run(session, *floors("torch"), options=("-W", "ignore::DeprecationWarning"))


@nox.session(python="3.11", name="numpy-1-pandas-2")
def numpy_1_pandas_2(session: nox.Session) -> None:
    """Today's packages with the last of numpy 1 and of pandas 2."""
    run(session, *PROJECT["dependencies"], TORCH, *NUMPY_1)


@nox.session(python=["3.12", "3.13"], name="python")
def newer_python(session: nox.Session) -> None:
    """Today's packages (numpy 2, pandas 3) on other Pythons than the one of the ordinary tests."""
    run(session, *PROJECT["dependencies"], TORCH, "numpy>=2", "pandas>=3")


@nox.session(python="3.11", name="keras-oldest")
def keras_oldest(session: nox.Session) -> None:
    """The floors of Keras and TensorFlow."""
    tensorflow, keras = floors("tensorflow")[-2:]
    packages = (tensorflow.replace("tensorflow", "tensorflow-cpu"), keras)
    run(session, *PROJECT["dependencies"], *NUMPY_1, *packages, tests=("tests/keras",), KERAS_BACKEND="tensorflow")


@nox.session(python="3.13", name="keras-jax")
def keras_jax(session: nox.Session) -> None:
    """Today's Keras on JAX, without TensorFlow or PyTorch beside it."""
    run(session, *PROJECT["dependencies"], "keras", "jax", tests=("tests/keras",), KERAS_BACKEND="jax")
