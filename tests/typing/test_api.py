"""The public API with types: `api.py` runs, and a type checker of another kind than mypy finds nothing in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest

from gradwatch.actions.base import BetweenStepsAction, RemedyOptions
from gradwatch.alerts.routing import Routing, RoutingOptions
from gradwatch.settings import Options, Settings
from tests.sizes import ROOT
from tests.typing import api


def test_a_typed_training_runs_and_its_run_reads(tmp_path: Path) -> None:
    path = api.watching(tmp_path)
    api.reading(path)
    api.reporting(path)


@pytest.mark.parametrize("use", [api.observing, api.in_a_trainer, api.failing])
def test_typed_uses_in_a_folder_run(use: Callable[[Path], None], tmp_path: Path) -> None:
    use(tmp_path)


@pytest.mark.parametrize("use", [api.alerting, api.healing, api.extending])
def test_typed_uses_run(use: Callable[[], None]) -> None:
    use()


def test_pyright_finds_nothing_in_a_typed_users_code() -> None:
    checker = shutil.which("basedpyright", path=str(Path(sys.executable).parent))
    assert checker, "basedpyright belongs to the extra 'dev'"
    command = [checker, "--outputjson", "--pythonpath", sys.executable, "--project", str(ROOT)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout)

    assert [(d["range"]["start"]["line"] + 1, d["message"]) for d in told["generalDiagnostics"]] == []
    assert told["summary"]["filesAnalyzed"] >= 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (Options, Settings.__dataclass_fields__),
        (RoutingOptions, Routing.__dataclass_fields__),
        (RemedyOptions, get_type_hints(BetweenStepsAction.__init__).keys() - {"return"}),
    ],
)
def test_type_checkers_are_told_of_every_keyword(options: type, names: object) -> None:
    assert set(options.__annotations__) == set(names)  # type: ignore[call-overload]
