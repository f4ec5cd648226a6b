"""A run directory that somebody else made, to be opened, resumed, drawn and watched."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gradwatch.cli import BAD_INPUT, main
from gradwatch.compact import compact_run
from gradwatch.errors import RunError
from gradwatch.reader import RunReader
from gradwatch.records import RunInfo
from gradwatch.storage.layout import METADATA_KEY, Layout
from gradwatch.storage.lock import Lock
from gradwatch.testing import write_run
from gradwatch.writer import RunWriter
from tests.record.building import PARAMETERS, batch_of

VICTIM = "nothing of this may be lost"


@pytest.fixture
def run(run_dir: Path) -> Path:
    return write_run(run_dir, steps=40, parameters=4)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file outside that a link in the run points to."""
    file = tmp_path / "victim"
    file.write_text(VICTIM)
    return file


def record(run: Path, steps: Iterable[int], **how: Any) -> None:
    writer = RunWriter(run, RunInfo(PARAMETERS), **how)
    writer.write(batch_of(list(steps), stats_every=10))
    writer.close()


def resume(run: Path) -> None:
    record(run, [100], resume=True)


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json.tmp", "events.jsonl", "writer.lock"])
@pytest.mark.parametrize("write", [resume, compact_run], ids=["resume", "compact"])
def test_no_writer_follows_a_link(run: Path, victim: Path, name: str, write: Callable[[Path], object]) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    with contextlib.suppress(OSError, RunError):  # refusing is as good as replacing the link
        write(run)

    assert victim.read_text() == VICTIM


@pytest.mark.parametrize("folder", ["steps", "samples", "rollups"])
def test_no_writer_follows_a_link_in_the_place_of_a_folder(run: Path, tmp_path: Path, folder: str) -> None:
    outside = tmp_path / "outside"
    (run / folder).rename(outside)
    (run / folder).symlink_to(outside)
    before = sorted(outside.iterdir())

    with pytest.raises(RunError, match="is a symbolic link, which gradwatch does not follow"):
        resume(run)
    with pytest.raises(RunError, match="is a symbolic link, which gradwatch does not follow"):
        record(run, [100], overwrite=True)
    assert sorted(outside.iterdir()) == before


def test_samples_behind_a_link_are_not_read(run_dir: Path, tmp_path: Path) -> None:
    record(run_dir, range(30))
    (run_dir / "samples").rename(tmp_path / "outside")
    (run_dir / "samples").symlink_to(tmp_path / "outside")

    reader = RunReader(run_dir)
    assert sum(len(batch) for batch in reader.batches()) == 30
    assert not any(batch.statistics for batch in reader.batches())


@pytest.mark.parametrize("command", ["report", "plot"])
def test_what_is_drawn_into_the_run_replaces_a_link(run: Path, victim: Path, command: str) -> None:
    (run / "plots").mkdir()
    for name in ("report.html", f".report.html.{os.getpid()}", "plots/timeline.png"):
        (run / name).symlink_to(victim)

    assert main([command, str(run), *(["timeline"] if command == "plot" else [])]) == 0
    assert victim.read_text() == VICTIM


def test_plots_behind_a_link_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outside").mkdir()
    (run / "plots").symlink_to(tmp_path / "outside")

    assert main(["plot", str(run), "timeline"]) == BAD_INPUT
    assert "is a symbolic link, which gradwatch does not follow" in capsys.readouterr().err
    assert list((tmp_path / "outside").iterdir()) == []


# -- files that are none -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("name", ["run.json", "events.jsonl", "writer.lock", "steps/000001-000000000000.parquet"])
@pytest.mark.parametrize("use", [RunReader, resume], ids=["read", "resume"])
def test_a_named_pipe_makes_nobody_wait(run: Path, name: str, use: Callable[[Path], object]) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with contextlib.suppress(OSError, RunError):  # an error is fine, waiting for ever is not
        use(run)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_the_holder_of_a_lock_is_not_asked_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "writer.lock")
    lock = Lock(tmp_path / "writer.lock")
    try:
        with pytest.raises(RunError, match="is being written by another process"):
            Lock(tmp_path / "writer.lock")
    finally:
        lock.release()


# -- content -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_a_pickle_in_an_arrow_file_is_not_loaded(run: Path, tmp_path: Path) -> None:
    """The way of CVE-2023-47248: pyarrow before 14.0.1 unpickled the metadata of an extension type."""
    trace = tmp_path / "trace"
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(trace)),
    }
    layout = Layout(("weight",))
    fields = [pa.field("step", pa.int64()), pa.field("grad_norm", pa.list_(pa.float32()), metadata=extension)]
    schema = pa.schema(fields, metadata={METADATA_KEY: layout.metadata()[METADATA_KEY]})
    path = run / "steps" / "000009-000000000050.arrow"
    with path.open("wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_batch(pa.record_batch([pa.array([50]), pa.array([[1.0]], pa.list_(pa.float32()))], schema=schema))

    reader = RunReader(run)
    assert reader.steps[0] == 0
    reader.grad_norms()
    assert not trace.exists()


def test_nested_json_without_end_is_damage_not_a_crash(run: Path) -> None:
    (run / "events.jsonl").write_text("[" * 100_000 + "\n" + '{"kind": "mark", "name": "kept"}\n')

    assert [event["name"] for event in RunReader(run)._events.of_kind("mark")] == ["kept"]


def test_overwriting_deletes_files_of_gradwatch_only(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "steps" / "thesis.parquet").write_text("mine too")
    record(run, [0], overwrite=True)

    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "steps" / "thesis.parquet").read_text() == "mine too"
    np.testing.assert_array_equal(RunReader(run).steps, [0])
