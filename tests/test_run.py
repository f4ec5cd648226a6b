from __future__ import annotations

from pathlib import Path

import pytest

import gradwatch as gw
from gradwatch.errors import ConfigurationError, RunNotFoundError, UnknownNameError
from gradwatch.run import Run, load
from gradwatch.testing import write_run
from tests.reporters.conftest import ENGINE


@pytest.fixture
def run(run_dir: Path) -> Run:
    return load(write_run(run_dir, steps=50, parameters=4, config={"detectors": ENGINE.config()}))


@pytest.mark.parametrize(
    ("name", "begins"), [("r.html", "<!doctype html>"), ("r.md", "# "), ("r.json", "{"), ("r", "<!doctype html>")]
)
def test_the_report_has_the_format_that_its_path_ends_in(run: Run, tmp_path: Path, name: str, begins: str) -> None:
    path = run.report(tmp_path / name)

    assert path == tmp_path / name
    assert path.read_text(encoding="utf-8").startswith(begins)


def test_a_named_format_beats_the_ending(run: Run, tmp_path: Path) -> None:
    assert run.report(tmp_path / "r.txt", format="md").read_text(encoding="utf-8").startswith("# ")


def test_without_a_path_the_report_lies_in_the_run(run: Run) -> None:
    assert run.report(format="json") == run.path / "report.json"
    assert len(load(run.path)) == 50


def test_an_unknown_format_is_an_error_that_lists_the_known_ones(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown report format 'pdf'. Known: html, json, md"):
        run.report(tmp_path / "r.pdf")


def test_a_path_that_cannot_be_written_is_an_error_that_names_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigurationError, match=r"cannot write '.*file/r.html'"):
        run.report(tmp_path / "file" / "r.html")


def test_nothing_is_left_beside_a_report(run: Run, tmp_path: Path) -> None:
    run.report(tmp_path / "out" / "r.json")

    assert [p.name for p in (tmp_path / "out").iterdir()] == ["r.json"]


def test_a_run_tells_itself_in_one_line(run: Run) -> None:
    assert repr(run) == f"<Run {str(run.path)!r}: finished, 50 steps, 0 findings>"


def test_a_run_shows_its_verdict_in_a_notebook(run: Run) -> None:
    assert "Nothing is wrong: 50 steps without a finding." in run._repr_html_()


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="does not exist or is empty"):
        load(tmp_path / "nothing")


def test_load_and_compare_are_public(run: Run) -> None:
    assert isinstance(gw.load(run.path), Run)
    assert gw.compare([run, run.path]).names


def test_live_looks_at_least_sometimes(run: Run) -> None:
    with pytest.raises(ConfigurationError, match="'every' must be > 0: 0"):
        run.live(every=0)
