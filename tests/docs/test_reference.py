"""What pages take from the code is what the code says today, and everything public has its place."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import gradwatch
from gradwatch import actions
from gradwatch.detectors import CATALOGUE
from tests.docs.blocks import PAGES
from tests.sizes import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "scripts" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_says_what_the_code_says(page: Path, reference: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")

    assert reference.renewed(text) == text, "run: python docs/scripts/reference.py"


def test_every_rule_has_a_page() -> None:
    assert {page.stem for page in (DOCS / "rules").glob("*.md")} == CATALOGUE.keys()


def test_every_action_has_a_page() -> None:
    public = [getattr(actions, name) for name in actions.__all__]
    concrete = {
        cls.__name__.lower()
        for cls in public
        if isinstance(cls, type) and issubclass(cls, actions.Action) and not inspect.isabstract(cls)
    }

    assert {page.stem for page in (DOCS / "actions").glob("*.md")} == concrete


@pytest.mark.parametrize("name", sorted(gradwatch.__all__))
def test_every_public_name_stands_on_the_page_of_the_api(name: str) -> None:
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    home = gradwatch._HOMES.get(name, gradwatch._MODULES.get(name, ""))
    if home == "gradwatch.keras":
        home = "gradwatch.integrations.keras"

    assert re.search(rf"^::: {re.escape(home)}(\.{name})?$|^::: {re.escape(home)}\.", api, re.MULTILINE)


@pytest.mark.parametrize("module", ["actions", "alerts", "detectors", "remedies", "sinks"])
def test_every_public_name_of_a_module_stands_on_the_page_of_the_api(module: str) -> None:
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    [members] = re.findall(rf"^::: gradwatch\.{module}\n    options:\n      members: \[(.*)\]$", api, re.MULTILINE)

    assert sorted(members.split(", ")) == sorted(getattr(gradwatch, module).__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)

    assert [target for target in targets if not (page.parent / target).exists()] == []
