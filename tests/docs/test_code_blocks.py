"""Every code block of the documentation works as printed, in an empty folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import gradwatch as gw
from tests.docs.blocks import PAGES, blocks, framework_marks, packages, run_page
from tests.sizes import ROOT

#: Actions that leave no record of each application, but a coefficient or a skip.
IN_THE_STEP = {"clip", "zclip", "autoclip", "agc", "skipstep"}


def parameters(*, keras: bool) -> list[object]:
    """The pages with code that need Keras, or those that do not; each belongs to the frameworks that it imports."""
    pages = {page: packages(page) for page in PAGES if blocks(page)}
    return [
        pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=framework_marks(needed))
        for page, needed in pages.items()
        if ("keras" in needed) is keras
    ]


@pytest.mark.parametrize("page", parameters(keras=False))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory")  # of trainers
def test_the_code_of_a_page_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    run_page(page)

    if page.parent.name == "rules":
        assert page.stem in set(gw.load(f"runs/{page.stem}").findings()["rule"])
    elif page.parent.name == "actions" and page.stem not in IN_THE_STEP:
        assert page.stem in {name.lower() for name in gw.load(f"runs/{page.stem}").actions()["action"]}
