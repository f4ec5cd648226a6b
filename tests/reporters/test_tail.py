from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradwatch.records import Finding, RunInfo
from gradwatch.reporters.tail import follow, glance, sparkline
from gradwatch.run import Run, load
from gradwatch.testing import synthetic_batches, synthetic_parameters
from gradwatch.writer import RunWriter
from tests.reporters.conftest import MakeRun


def told(run: Run, *, terminal: bool = False, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="replace")
    follow(
        run,
        once=True,
        console=Console(file=file, force_terminal=terminal, width=100, highlight=False, no_color=not terminal),
    )
    file.flush()
    return raw.getvalue().decode(encoding)


def test_a_pipe_is_told_findings_the_latest_step_and_the_status(made_runs: MakeRun) -> None:
    lines = told(made_runs("nan")).splitlines()

    assert lines[0].startswith("CRITICAL step 280: ")
    assert lines[-2].startswith("step 399  loss ")
    assert lines[-1] == "nan: finished"


def test_a_pipe_gets_no_colour(made_runs: MakeRun) -> None:
    assert "\x1b" not in told(made_runs("nan"))


def test_a_terminal_is_shown_sparklines_and_findings(made_runs: MakeRun) -> None:
    shown = told(made_runs("nan"), terminal=True)

    assert "layers." in shown
    assert "×" in shown
    assert "CRITICAL" in shown


def test_a_terminal_without_unicode_is_shown_plain_bars(made_runs: MakeRun) -> None:
    assert "▁" not in told(made_runs(), terminal=True, encoding="ascii")


def test_an_empty_run_can_be_followed(made_runs: MakeRun) -> None:
    assert told(made_runs(steps=0)).strip() == "healthy: finished"


def test_hostile_names_reach_no_terminal(hostile: Run) -> None:
    assert "\x1b" not in told(hostile)


def test_the_layers_of_an_open_finding_come_first(made_runs: MakeRun) -> None:
    run = made_runs("dead")
    root = run.summary().root

    assert root is not None
    assert glance(run).layers[0][0] == root.layers[0]


def test_following_ends_with_the_run_and_tells_a_finding_once(tmp_path: Path) -> None:
    parameters = synthetic_parameters(4)
    writer = RunWriter(tmp_path / "run", RunInfo(parameters), flush_every=1)
    batches = iter(next(synthetic_batches(steps=60, parameters=parameters)).split(20))
    finding = Finding("s", "spike", "warning", 5, 5, message="it jumped")
    writer.write(next(batches))
    run = wait_for_steps(load(tmp_path / "run"), 20)
    looks = iter(range(100))

    def later(_: float) -> None:
        look = next(looks)
        if look == 0:
            writer.event("finding", finding.to_json(), sync=True)
            writer.write(next(batches))
            wait_for_steps(load(tmp_path / "run"), 40)
        if look == 1:
            writer.write(next(batches))
            writer.close()

    file = io.StringIO()
    follow(run, every=0.01, console=Console(file=file, width=100), sleep=later)
    lines = file.getvalue().splitlines()

    assert [line for line in lines if "it jumped" in line] == ["WARNING step 5: it jumped"]
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["19", "39", "59"]
    assert lines[-1] == "run: finished"


def wait_for_steps(run: Run, steps: int) -> Run:
    """The writer's thread writes in its own time."""
    import time

    deadline = time.monotonic() + 60
    while len(run) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        run.refresh()
    return run


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=200), st.integers(1, 60))
def test_a_sparkline_has_a_bar_for_every_value_or_every_column(values: list[float], width: int) -> None:
    assert len(sparkline(np.array(values), width)) == min(len(values), width)


@pytest.mark.parametrize(("values", "drawn"), [([1.0, 1.0], "▁▁"), ([-1.0, 0.0, 1.0], "▁▅█"), ([np.inf, np.nan], "××")])
def test_a_sparkline_shows_levels(values: list[float], drawn: str) -> None:
    assert sparkline(np.array(values), 10) == drawn
