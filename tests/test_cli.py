from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from gradwatch.cli import main
from gradwatch.testing import write_run
from tests.reporters.conftest import ENGINE, findings_of


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("cli") / "healthy",
        steps=120,
        parameters=8,
        seed=3,
        config={"detectors": ENGINE.config()},
    )


@pytest.fixture(scope="session")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gradwatch.run import load

    path = tmp_path_factory.mktemp("cli") / "sick"
    write_run(path, steps=200, parameters=8, scenario="nan", seed=3)
    found = findings_of(load(path))
    return write_run(path, steps=200, parameters=8, scenario="nan", seed=3, findings=found, overwrite=True)


def test_summary_says_what_is_wrong(sick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", str(sick)]) == 0
    said = capsys.readouterr().out

    assert "SICK" in said
    assert "Gradients become NaN or infinite" in said


def test_summary_as_json_is_json(sick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", str(sick), "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["state"] == "sick"


def test_report_writes_the_page_and_prints_its_path(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(healthy), "-o", str(tmp_path / "r.html")]) == 0

    assert capsys.readouterr().out.strip() == str(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("kind", ["md", "json"])
def test_report_writes_other_formats(healthy: Path, tmp_path: Path, kind: str) -> None:
    assert main(["report", str(healthy), "--format", kind, "-o", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r").stat().st_size > 100


def test_plot_writes_the_asked_for_figures(healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(healthy), "heatmap", "depth_profile", "-o", str(tmp_path), "--dpi", "40"]) == 0

    assert {p.name for p in tmp_path.iterdir()} == {"heatmap.png", "depth_profile.png"}
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_plot_writes_vector_graphics(healthy: Path, tmp_path: Path) -> None:
    assert main(["plot", str(healthy), "timeline", "-o", str(tmp_path), "--type", "svg"]) == 0
    assert "<svg" in (tmp_path / "timeline.svg").read_text(encoding="utf-8")


def test_tail_once_tells_the_latest_step(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", str(healthy), "--once"]) == 0
    assert "step 119" in capsys.readouterr().out


def test_compare_tells_where_runs_part(
    healthy: Path, sick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(healthy), str(sick), "-o", str(tmp_path / "c.html")]) == 0

    assert "first differ at step" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "c.html").exists()


def test_compare_as_json_is_json(healthy: Path, sick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(healthy), str(sick), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["partings"][0]["first_difference"]["step"] >= 0


def test_export_writes_csv_to_standard_output(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(healthy), "--what", "metrics"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))

    assert len(rows) == 120
    assert {"step", "loss", "global_norm"} <= rows[0].keys()


def test_everything_can_be_exported_and_imported(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, back = tmp_path / "all.csv", tmp_path / "back"

    assert main(["export", str(healthy), "--what", "everything", "-o", str(table)]) == 0
    assert main(["import", str(table), str(back)]) == 0
    assert main(["check", str(back)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [str(table), str(back)]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_export_writes_the_format_that_the_path_ends_in(healthy: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"norms.{kind}"

    assert main(["export", str(healthy), "--by", "layer", "-o", str(path)]) == 0
    if kind == "csv":
        table = pd.read_csv(path)
    else:
        table = pd.read_parquet(path) if kind == "parquet" else pd.read_json(path, lines=True)
    assert len(table) == 120


def test_check_of_a_healthy_run_exits_with_0(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(healthy)]) == 0
    assert "No finding at or above 'warning'." in capsys.readouterr().out


def test_check_of_a_sick_run_exits_with_1_and_names_the_finding(sick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(sick), "--fail-on", "critical"]) == 1
    assert "nonfinite" in capsys.readouterr().out


def test_check_as_json_is_json_and_keeps_the_exit_code(sick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(sick), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)

    assert told["failed"]
    assert "nonfinite" in {finding["rule"] for finding in told["findings"]}


def test_check_with_rules_of_ones_own_runs_only_those(
    sick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules.toml").write_text('only = ["dead"]\n')

    assert main(["check", str(sick), "--rules", str(tmp_path / "rules.toml")]) == 0


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ('only = ["explodng"]', "unknown rule 'explodng'; did you mean 'exploding'"),
        ("[dead]\nnonsense = 1", "rule 'dead' in"),
        ("dead = 3", "'dead' must be a table of thresholds"),
        ("[dead", "is not TOML"),
    ],
)
def test_rules_that_break_a_rule_are_told(
    sick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rules: str, error: str
) -> None:
    (tmp_path / "rules.toml").write_text(rules)

    assert main(["check", str(sick), "--rules", str(tmp_path / "rules.toml")]) == 2
    assert error in capsys.readouterr().err


def test_compact_keeps_the_asked_for_steps_and_summary_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run", steps=3000, parameters=2)

    assert main(["compact", str(path), "--keep-last", "50", "--first", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_after"] == 100
    assert main(["summary", str(path)]) == 0
    assert "Compacted: 100 steps of steps 0 to 2,999 kept in full" in " ".join(capsys.readouterr().out.split())


def test_list_tells_every_run_below_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", steps=20, parameters=2, config={"detectors": ENGINE.config()})
    write_run(tmp_path / "deep" / "er" / "b", steps=30, parameters=2, status="crashed")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{")

    assert main(["list", str(tmp_path), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "a": "healthy",
        "deep/er/b": "crashed",
        "c": "unjudged",
    }
    assert main(["list", str(tmp_path)]) == 0
    assert "deep/er/b" in capsys.readouterr().out


def test_list_of_a_directory_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 0
    assert "No run under" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["summary", "/nowhere/run"], "/nowhere/run does not exist or is empty"),
        (["plot", "RUN", "heatmp"], "unknown figure 'heatmp'; did you mean 'heatmap'"),
        (["plot", "RUN", "--type", "gif"], "unknown file type 'gif'"),
        (["export", "RUN", "--what", "lossses"], "unknown table 'lossses'"),
        (["export", "RUN", "--format", "parquet"], "'--out' must be given for Parquet"),
        (["export", "RUN", "--what", "everything"], "'--out' must be given for everything"),
        (["import", "/nowhere.csv", "/nowhere/run"], "/nowhere.csv is not a file"),
        (["compare", "RUN"], "'runs' must be two or more runs"),
        (["list", "/nowhere"], "'ROOT' must be a directory"),
        (["report", "RUN", "--format", "pdf"], "'pdf' is not one of"),
        (["serve", "/nowhere"], "'RUN_OR_ROOT' must be a directory"),
        (["bogus"], "No such command 'bogus'"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_is_wrong(
    healthy: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    assert main([str(healthy) if a == "RUN" else a for a in arguments]) == 2
    assert error in " ".join(capsys.readouterr().err.split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out

    for command in (
        "demo",
        "summary",
        "report",
        "plot",
        "tail",
        "serve",
        "compare",
        "export",
        "import",
        "check",
        "list",
        "compact",
    ):
        assert command in said


def test_the_package_can_be_run(healthy: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "summary", str(healthy)], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "HEALTHY" in done.stdout


def test_help_loads_neither_pandas_nor_matplotlib() -> None:
    code = (
        "import sys; from gradwatch.cli import main; main(['--help']);"
        "assert not {'pandas', 'matplotlib'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
