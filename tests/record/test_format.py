"""`docs/record-format.md` says enough: its snippets read a run without gradwatch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.reader import RunReader
from gradwatch.testing import write_run
from tests.docs.blocks import blocks
from tests.record.building import PARAMETERS, batch_of, store_at
from tests.sizes import ROOT

PAGE = ROOT / "docs" / "record-format.md"


def snippets(language: str) -> list[str]:
    return [block.code for block in blocks(PAGE, language)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunReader:
    monkeypatch.chdir(tmp_path)
    return RunReader(write_run("run", steps=3000, parameters=4, scenario="spike"))


@pytest.mark.needs("dev")
def test_the_sql_reads_the_sealed_steps(run: RunReader) -> None:
    import duckdb

    rows = duckdb.execute(snippets("sql")[0]).fetchall()

    norms = run.grad_norms()["layers.0.weight"]
    assert [row[0] for row in rows] == list(range(3000))
    np.testing.assert_array_equal(np.array([row[2] for row in rows], np.float32), norms.to_numpy())


@pytest.mark.needs("dev")
def test_the_sql_finds_the_worst_norm_in_the_rollups(run: RunReader) -> None:
    import duckdb

    rows = duckdb.execute(snippets("sql")[1]).fetchall()

    assert {row[0]: np.float32(row[1]) for row in rows} == run.grad_norms().max().to_dict()


@pytest.mark.needs("dev")
def test_the_sql_of_a_resumed_run_takes_the_last_row_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    monkeypatch.chdir(tmp_path)
    for seed, resume in ((0, False), (1, 10)):
        store = store_at(tmp_path / "run", resume=resume)
        store.append(batch_of(range(int(resume), 30), seed=seed))
        store.finish("finished")
        store.release()

    rows = duckdb.execute(snippets("sql")[2]).fetchall()

    assert [row[1] for row in rows] == RunReader("run").metrics()["loss"].tolist()


@pytest.mark.needs("dev")
def test_polars_reads_the_sealed_steps(run: RunReader) -> None:
    names: dict[str, Any] = {}

    exec(snippets("python")[1], names)  # noqa: S102 -- code of our own documentation

    assert names["weight"]["grad_norm/layers.0.weight"].to_list() == run.grad_norms()["layers.0.weight"].tolist()


@pytest.mark.needs("dev")
def test_polars_reads_the_open_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import polars

    monkeypatch.chdir(tmp_path)
    store = store_at(tmp_path / "run")
    store.append(batch_of(range(20)))
    names: dict[str, Any] = {"pl": polars}

    exec(snippets("python")[2], names)  # noqa: S102 -- as above
    store.release()

    assert names["tail"].columns == ["step", *(p.name for p in PARAMETERS)]
    assert names["tail"]["layers.1.weight"].to_list() == batch_of(range(20)).grad_norm[:, 2].tolist()


@pytest.mark.parametrize("name", ["run.json", "events.jsonl", "steps", "rollups", "writer.lock"])
def test_the_page_names_every_file_of_a_run(run: RunReader, name: str) -> None:
    assert (run.path / name).exists()
    assert name in PAGE.read_text(encoding="utf-8")
