"""Runs leave as tables and come back from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gradwatch.errors import ConfigurationError, RunExistsError, RunNotFoundError, UnknownNameError
from gradwatch.export import export_run, to_frame
from gradwatch.imports import import_csv, import_frame, import_run
from gradwatch.reader import RunReader
from gradwatch.reporters.checking import findings_of
from gradwatch.testing import write_run


@pytest.fixture
def run(run_dir: Path) -> RunReader:
    return RunReader(write_run(run_dir, steps=2500, parameters=4, statistics=["weight_norm"], scenario="spike"))


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_an_export_holds_every_step(run: RunReader, tmp_path: Path, suffix: str) -> None:
    path = export_run(run, tmp_path / f"run.{suffix}")

    if suffix == "csv":
        table = pd.read_csv(path)
    else:
        table = pd.read_parquet(path) if suffix == "parquet" else pd.read_json(path, lines=True)
    table = table.set_index("step")

    norms = run.grad_norms()
    np.testing.assert_allclose(table[[f"grad_norm/{name}" for name in norms]].to_numpy(), norms.to_numpy(), rtol=1e-6)
    assert table["weight_norm/layers.0.weight"].notna().sum() == 250


def test_a_run_survives_export_and_import(run: RunReader, tmp_path: Path) -> None:
    back = RunReader(import_csv(export_run(run, tmp_path / "run.csv"), tmp_path / "back"))

    pd.testing.assert_frame_equal(back.grad_norms(), run.grad_norms())
    pd.testing.assert_frame_equal(back.statistic("weight_norm"), run.statistic("weight_norm"))
    pd.testing.assert_series_equal(back.metrics()["loss"], run.metrics()["loss"])


@pytest.mark.needs("tensorboard")
def test_a_run_survives_the_event_files_of_tensorboard(run: RunReader, tmp_path: Path) -> None:
    back = RunReader(import_run(export_run(run, tmp_path / "tb", format="tensorboard"), tmp_path / "back"))

    pd.testing.assert_frame_equal(back.grad_norms()[list(run.grad_norms())], run.grad_norms())
    pd.testing.assert_frame_equal(back.statistic("weight_norm"), run.statistic("weight_norm"))


def test_an_import_finds_what_a_watched_training_would_have(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "run", steps=600, parameters=6, scenario="exploding"))

    back = RunReader(import_run(export_run(run, tmp_path / "run.csv"), tmp_path / "back"))

    found = [(finding.rule, finding.first_step) for finding in back.finding_list()]
    assert found == [(finding.rule, finding.first_step) for finding in findings_of(run)] != []


def test_a_frame_has_a_column_per_statistic_and_name(run: RunReader) -> None:
    assert {"loss", "stage", "grad_norm/layers.0.weight", "weight_norm/layers.1.bias"} <= set(to_frame(run).columns)


def test_an_export_of_another_tool_is_understood(tmp_path: Path) -> None:
    table = pd.DataFrame({"_step": [0, 1, 2], "train/loss": [3.0, 2.0, None], "gradients/fc.weight": [0.1, None, 0.3]})
    table.to_csv(tmp_path / "other.csv", index=False)

    run = RunReader(import_csv(tmp_path / "other.csv", tmp_path / "run"))

    assert run.grad_norms().columns.tolist() == ["fc.weight"]
    assert run.metrics()["loss"].tolist()[:2] == [3.0, 2.0]
    assert np.isnan(run.grad_norms()["fc.weight"][1])


def test_columns_of_gradients_can_be_named(tmp_path: Path) -> None:
    table = pd.DataFrame({"iteration": [0, 1], "g:a": [1.0, 2.0]})

    path = import_frame(table, tmp_path / "run", gradients=lambda n: n[2:] if n.startswith("g:") else None)

    assert RunReader(path).grad_norms()["a"].tolist() == [1.0, 2.0]


def test_an_unknown_format_is_refused(run: RunReader, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown format 'xlsx'"):
        export_run(run, tmp_path / "run.xlsx", format="xlsx")


def test_a_suffix_that_tells_no_format_is_refused(run: RunReader, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'format' must be given"):
        export_run(run, tmp_path / "run.dat")


def test_an_export_replaces_nothing_unasked(run: RunReader, tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("mine")

    with pytest.raises(RunExistsError, match="is there already"):
        export_run(run, tmp_path / "run.csv")


def test_an_import_names_the_missing_step_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")

    with pytest.raises(ConfigurationError, match="'step' must be one of the columns a, b: 'n'"):
        import_csv(tmp_path / "t.csv", tmp_path / "run", step="n")


def test_an_import_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="is not a file"):
        import_csv(tmp_path / "missing.csv", tmp_path / "run")


def test_json_lines_hold_one_object_per_step(run: RunReader, tmp_path: Path) -> None:
    lines = export_run(run, tmp_path / "run.jsonl").read_text().splitlines()

    assert [json.loads(line)["step"] for line in lines] == list(range(2500))
