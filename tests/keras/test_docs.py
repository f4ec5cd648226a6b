"""The pages and examples about Keras work as printed, on each backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import run_page
from tests.docs.test_code_blocks import parameters
from tests.sizes import ROOT
from tests.test_examples import run_example


@pytest.mark.parametrize("page", parameters(keras=True))
def test_the_code_of_a_page_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    run_page(page)


def test_the_example_trains_and_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    run_example(ROOT / "examples" / "keras_fit.py")
