"""Runs to report on, each written once for all tests that only read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.engine import Engine, replay
from gradwatch.records import Finding, Parameter
from gradwatch.run import Run, load
from gradwatch.testing import write_run

#: Names that would do harm where they are not escaped: HTML, scripts, terminals, mathematics, direction of writing.
HOSTILE = (
    "<script>alert(1)</script>", "</script><b>bold", "<img src=x onerror=alert(2)>", "$\\frac{", "_private",
    "\x1b[31mred\nline", "名前.層", "x" * 150, "&amp;'\"`", "\u202etxet", "a|b*c_d[e](f)", "{{ 7*7 }}", "%{y}",
)  # fmt: skip

ENGINE = Engine("default", RunContext(()))
MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def made_runs(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Makes a synthetic run with the findings that a replay of the default detectors gives; equal ones are shared."""
    root = tmp_path_factory.mktemp("runs")
    made: dict[str, Path] = {}

    def make(
        scenario: str = "healthy", *, name: str | None = None, steps: int = 400, parameters: Any = 24, **more: Any
    ) -> Run:
        key = repr((scenario, name, steps, parameters, sorted(more.items(), key=lambda item: item[0])))
        if key not in made:
            path = root / str(len(made)) / (name or scenario)
            settings = {"steps": steps, "parameters": parameters, "scenario": scenario, "seed": 3, **more}
            settings["config"] = {"detectors": ENGINE.config(), **more.get("config", {})}
            write_run(path, **settings)
            if "findings" not in more:
                found = findings_of(load(path))
                write_run(path, **settings, findings=found, overwrite=True)
            made[key] = path
        return load(made[key])

    return make


def findings_of(run: Run) -> list[Finding]:
    """What the default detectors find in a run."""
    return replay(run.batches(), Engine("default", RunContext(run.info.parameters)))


def named_parameters(names: tuple[str, ...]) -> tuple[Parameter, ...]:
    """One weight per layer of the given names."""
    return tuple(Parameter(f"{name}.weight", (4, 4), layer=name, depth=i) for i, name in enumerate(names))


@pytest.fixture
def hostile(made_runs: MakeRun) -> Run:
    """A sick run whose layers have hostile names, with a finding about each."""
    found = [
        Finding(
            f"f{i}", "exploding", "critical", 30 + i, 80, layers=(name,), message=f"{name} explodes", cause=name,
            advice=(name,), evidence={name: 1.0}, value=100.0, threshold=10.0,
        )
        for i, name in enumerate(HOSTILE)
    ]  # fmt: skip
    return made_runs("exploding", name="hostile", steps=100, parameters=named_parameters(HOSTILE), findings=found)
