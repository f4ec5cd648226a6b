"""Every script in `examples/` trains and leaves a record."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest

import gradwatch as gw
from tests.docs.blocks import framework_marks, packages_of
from tests.sizes import ROOT

NEEDED = {path: packages_of(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "examples").glob("*.py"))}
#: Keras is tested in processes of its own, one per backend.
HERE = [
    pytest.param(path, id=path.stem, marks=framework_marks(needed))
    for path, needed in NEEDED.items()
    if "keras" not in needed
]


def run_example(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainers
        runpy.run_path(str(path), run_name="__main__")

    [run] = [path.parent for path in Path("runs").rglob("run.json")]
    assert gw.load(run).info.status == "finished"
    assert len(gw.load(run)) >= 20


@pytest.mark.parametrize("path", HERE)
def test_an_example_trains_and_leaves_a_record(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    run_example(path)
