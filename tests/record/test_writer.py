"""One writer per directory, resumed runs, events, and what a writer refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradwatch.errors import ConfigurationError, RunExistsError, RunFormatError, RunLockedError
from gradwatch.reader import RunReader
from gradwatch.records import ActionRecord, Finding, Parameter, RunInfo, StepBatch
from gradwatch.writer import RunWriter
from tests.record.building import PARAMETERS, assert_same, batch_of, store_at


def writer_at(path: Path, *, resume: bool | int = False, overwrite: bool = False) -> RunWriter:
    return RunWriter(path, RunInfo(PARAMETERS), resume=resume, overwrite=overwrite)


def record(path: Path, steps: range, *, resume: bool | int = False, overwrite: bool = False, seed: int = 0) -> None:
    writer = writer_at(path, resume=resume, overwrite=overwrite)
    writer.write(batch_of(steps, seed=seed))
    writer.close()


def eventually(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_steps_that_are_written_while_the_thread_asks_for_more_are_not_superseded(run_dir: Path) -> None:
    writer = RunWriter(run_dir, RunInfo(PARAMETERS), flush_seconds=0.01)
    steps = [batch_of(range(k, k + 1)) for k in range(2)]

    def tell(put: Callable[[StepBatch], object]) -> None:
        if len(steps) == 2:
            writer.write(steps.pop(0))
            put(steps.pop())

    writer.ask_when_idle(tell)
    eventually(lambda: not steps)
    writer.close()

    assert list(RunReader(run_dir).grad_norms().index) == [0, 1]


# -- one writer --------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_writes(run_dir: Path) -> None:
    first = writer_at(run_dir)

    with pytest.raises(RunLockedError, match=f"is being written by process {os.getpid()} on "):
        writer_at(run_dir, resume=True)
    first.close()


def test_the_lock_dies_with_its_process(run_dir: Path) -> None:
    code = (
        "import os, sys; from gradwatch.writer import RunWriter; from gradwatch.records import RunInfo, Parameter\n"
        "w = RunWriter(sys.argv[1], RunInfo((Parameter('a.weight'),))); print('ready', flush=True); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=False, cwd=Path(__file__).parents[2])

    assert RunReader(run_dir).info.status == "crashed"
    writer_at(run_dir, resume=True).close()


def test_a_reader_sees_that_the_writer_is_alive(run_dir: Path) -> None:
    writer = writer_at(run_dir)

    assert RunReader(run_dir).info.status == "running"
    writer.close()
    assert RunReader(run_dir).info.status == "finished"


def test_a_reader_does_not_keep_a_writer_out(run_dir: Path) -> None:
    record(run_dir, range(5))
    reader = RunReader(run_dir)

    record(run_dir, range(5, 9), resume=True)
    reader.refresh()

    assert len(reader) == 9


def _write_in_child(writer: RunWriter) -> None:
    writer.write(batch_of(range(100, 200)))
    writer.event("mark", {"name": "child"})
    writer.update_info(framework="child")
    writer.close()
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_writes_nothing_and_holds_no_lock(run_dir: Path) -> None:
    writer = writer_at(run_dir)
    writer.write(batch_of(range(10)))
    child = multiprocessing.get_context("fork").Process(target=_write_in_child, args=(writer,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    sleeper.start()
    writer.close()

    writer_at(run_dir, resume=True).close()

    sleeper.kill()
    sleeper.join()
    reader = RunReader(run_dir)
    assert len(reader) == 10
    assert not any(mark["name"] == "child" for mark in reader.marks())
    assert reader.info.framework == ""


# -- what is there already ---------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_unasked(run_dir: Path) -> None:
    record(run_dir, range(5))

    with pytest.raises(RunExistsError, match="say resume=True to go on with it, or overwrite=True"):
        writer_at(run_dir)


def test_a_run_that_crashed_before_it_recorded_anything_is_none(run_dir: Path) -> None:
    writer_at(run_dir).close("crashed", "could not attach")

    writer = writer_at(run_dir)

    writer.event("mark", {"text": "begun", "step": 0})
    writer.close("crashed", "of something else")
    with pytest.raises(RunExistsError, match="say resume=True"):
        writer_at(run_dir)


def test_overwriting_leaves_nothing_of_the_old_run(run_dir: Path) -> None:
    record(run_dir, range(50))

    record(run_dir, range(5), overwrite=True, seed=3)

    assert len(RunReader(run_dir)) == 5
    assert RunReader(run_dir).marks() == []


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")

    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RunFormatError, match="holds something else than a run"):
            RunWriter(tmp_path, RunInfo(PARAMETERS), **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwriting_deletes_only_files_of_the_run(run_dir: Path) -> None:
    record(run_dir, range(5))
    (run_dir / "steps" / "notes.txt").write_text("mine")
    (run_dir / "checkpoint.pt").write_text("mine")

    record(run_dir, range(5), overwrite=True)

    assert (run_dir / "steps" / "notes.txt").exists()
    assert (run_dir / "checkpoint.pt").exists()


def test_a_run_file_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "theirs"}')

    with pytest.raises(RunFormatError, match="was not written by gradwatch"):
        writer_at(tmp_path, overwrite=True)


def test_a_newer_run_is_not_overwritten(run_dir: Path) -> None:
    record(run_dir, range(5))
    facts = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**facts, "format_version": 99}))

    with pytest.raises(RunFormatError, match="written by a newer gradwatch"):
        writer_at(run_dir, overwrite=True)


def test_a_symbolic_link_in_place_of_a_folder_is_refused(run_dir: Path, tmp_path: Path) -> None:
    record(run_dir, range(5))
    elsewhere = tmp_path / "elsewhere"
    (run_dir / "rollups").rename(elsewhere)
    (run_dir / "rollups").symlink_to(elsewhere)

    with pytest.raises(RunFormatError, match="symbolic link"):
        writer_at(run_dir, overwrite=True)
    assert list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flush_every": 0}, "'flush_every' must be >= 1: 0"),
        ({"flush_seconds": 0.0}, "'flush_seconds' must be > 0: 0.0"),
        ({"resume": -3}, "'resume' must be a bool or a step >= 0: -3"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_nonsense_is_refused_at_the_call(run_dir: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RunWriter(run_dir, RunInfo(PARAMETERS), **settings)  # type: ignore[arg-type]
    assert not run_dir.exists()


def test_two_parameters_of_one_name_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="two parameters have the name 'a'"):
        RunWriter(run_dir, RunInfo((Parameter("a"), Parameter("a"))))


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_after_its_last_step(run_dir: Path) -> None:
    record(run_dir, range(20))

    writer = writer_at(run_dir, resume=True)
    assert writer.next_step == 20
    writer.write(batch_of(range(20, 30)))
    writer.close()

    assert RunReader(run_dir).steps.tolist() == list(range(30))


def test_repeated_steps_supersede_the_old_ones(run_dir: Path) -> None:
    record(run_dir, range(20))
    record(run_dir, range(12, 25), resume=12, seed=5)

    batches = list(RunReader(run_dir).batches())

    assert_same(batches[0], batch_of(range(12)))
    assert_same(batches[1], batch_of(range(12, 25), seed=5))
    assert RunReader(run_dir).rollup(10).count[:, 0].tolist() == [10, 10, 5]


def test_steps_that_start_over_in_one_process_supersede_too(run_dir: Path) -> None:
    writer = writer_at(run_dir)
    writer.write(batch_of(range(20)))
    writer.write(batch_of(range(8, 15), seed=5))
    writer.close()

    assert RunReader(run_dir).steps.tolist() == list(range(15))


def test_what_was_claimed_by_resuming_is_superseded_even_if_steps_are_missing(run_dir: Path) -> None:
    record(run_dir, range(20))
    record(run_dir, range(15, 25), resume=10)

    assert RunReader(run_dir).steps.tolist() == [*range(10), *range(15, 25)]


def test_findings_and_actions_of_superseded_steps_do_not_count(run_dir: Path) -> None:
    writer = writer_at(run_dir)
    writer.write(batch_of(range(20)))
    for step in (5, 15):
        writer.event("finding", Finding(f"f{step}", "spike", "warning", step, step).to_json())
        writer.event("action", ActionRecord(f"a{step}", step, "DecayLR").to_json())
    writer.close()
    record(run_dir, range(10, 30), resume=10)

    reader = RunReader(run_dir)

    assert [finding.id for finding in reader.finding_list()] == ["f5"]
    assert [action.id for action in reader.action_list()] == ["a5"]


def test_both_processes_are_remembered(run_dir: Path) -> None:
    record(run_dir, range(20))
    record(run_dir, range(20, 30), resume=True)

    processes = RunReader(run_dir).processes

    assert [process["first_step"] for process in processes] == [0, 20]
    assert [process["status"] for process in processes] == ["finished", "finished"]


def test_a_resumed_run_may_have_other_parameters(run_dir: Path) -> None:
    record(run_dir, range(5))
    other = (PARAMETERS[0], Parameter("new.weight"))
    writer = RunWriter(run_dir, RunInfo(other), resume=True)
    writer.write(batch_of(range(5, 9), parameters=other))
    writer.close()

    norms = RunReader(run_dir).grad_norms()

    assert norms.columns.tolist() == [*(p.name for p in PARAMETERS), "new.weight"]
    assert norms.notna().sum().tolist() == [9, 5, 5, 5, 5, 5, 4]


def test_resuming_seals_what_a_killed_process_left(run_dir: Path) -> None:
    killed = store_at(run_dir)
    killed.append(batch_of(range(30)))
    killed.release()

    record(run_dir, range(30, 40), resume=True)

    assert {file.suffix for file in (run_dir / "steps").iterdir()} == {".parquet"}
    assert len(RunReader(run_dir)) == 40


# -- events and facts --------------------------------------------------------------------------------------------------


def test_the_last_state_of_a_finding_counts(run_dir: Path) -> None:
    writer = writer_at(run_dir)
    for last, resolved in ((3, None), (9, 10)):
        finding = Finding("f", "spike", "warning", 2, last, layers=("a", "b"), value=np.inf, resolved_step=resolved)
        writer.event("finding", finding.to_json())
    writer.close()

    (found,) = RunReader(run_dir).finding_list()

    assert (found.last_step, found.resolved_step, found.value, found.layers) == (9, 10, np.inf, ("a", "b"))
    assert RunReader(run_dir).findings().loc[0, "layer"] == "a"


def test_an_urgent_event_is_on_disk_at_once(run_dir: Path) -> None:
    writer = RunWriter(run_dir, RunInfo(PARAMETERS), flush_seconds=60)
    writer.event("finding", Finding("f", "nonfinite", "critical", 0, 0).to_json(), sync=True)

    eventually(lambda: RunReader(run_dir).finding_list())
    writer.close()


def test_any_value_can_be_written_as_an_event(run_dir: Path) -> None:
    writer = writer_at(run_dir)
    writer.event("mark", {"name": "odd", "nan": np.nan, "array": np.array([1, np.inf]), "path": Path("x"), "set": {1}})
    writer.close()

    (mark,) = RunReader(run_dir).marks()

    assert mark["array"] == [1, "inf"]
    assert mark["nan"] is None


def test_a_torn_event_hides_none_that_follow(run_dir: Path) -> None:
    record(run_dir, range(5))
    with (run_dir / "events.jsonl").open("a") as file:
        file.write('{"kind": "mark", "na')
    writer = writer_at(run_dir, resume=True)
    writer.event("mark", {"name": "after"})
    writer.close()

    assert [mark["name"] for mark in RunReader(run_dir).marks()] == ["after"]


def test_facts_can_be_changed_while_the_run_goes_on(run_dir: Path) -> None:
    writer = writer_at(run_dir)
    writer.update_info(framework="torch", config={"a": 1})

    eventually(lambda: RunReader(run_dir).info.framework == "torch")
    writer.close()
    assert RunReader(run_dir).info.config == {"a": 1}


def test_a_fact_that_there_is_not_is_refused(run_dir: Path) -> None:
    writer = writer_at(run_dir)

    with pytest.raises(ConfigurationError, match="no field colour"):
        writer.update_info(colour="red")
    writer.close()


def test_steps_are_on_disk_before_close(run_dir: Path) -> None:
    writer = RunWriter(run_dir, RunInfo(PARAMETERS), flush_every=50, flush_seconds=60)
    writer.write(batch_of(range(50)))

    eventually(lambda: len(RunReader(run_dir)) == 50)
    writer.close()


def test_a_slow_run_is_flushed_by_the_clock(run_dir: Path) -> None:
    writer = RunWriter(run_dir, RunInfo(PARAMETERS), flush_every=1000, flush_seconds=0.05)
    writer.write(batch_of([0]))

    eventually(lambda: len(RunReader(run_dir)) == 1)
    writer.close()


def test_closing_twice_and_writing_afterwards_do_nothing(run_dir: Path) -> None:
    writer = writer_at(run_dir)
    writer.close("crashed", "out of memory")
    writer.close()
    writer.write(batch_of(range(5)))
    writer.event("mark", {})
    writer.update_info(framework="torch")

    info = RunReader(run_dir).info

    assert (info.status, info.status_detail) == ("crashed", "out of memory")
    assert len(RunReader(run_dir)) == 0


def test_a_writer_that_nobody_holds_closes_itself(run_dir: Path) -> None:
    writer = writer_at(run_dir)
    writer.write(batch_of(range(5)))
    del writer

    info = RunReader(run_dir).info

    assert (info.status, info.status_detail) == ("crashed", "the writer was not closed")
    assert len(RunReader(run_dir)) == 5
    assert not any(thread.name.startswith("gradwatch-") for thread in threading.enumerate())


def test_rows_that_cannot_be_encoded_do_not_stop_those_that_follow(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = RunWriter(run_dir, RunInfo(PARAMETERS), flush_every=1)
    bad = batch_of(range(3))
    object.__setattr__(bad, "metrics", {"loss": np.array(["a", "b", "c"])})
    writer.write(bad)
    eventually(lambda: writer.dropped_steps == 3)
    writer.write(batch_of(range(3, 6)))
    writer.close()

    assert RunReader(run_dir).steps.tolist()[-3:] == [3, 4, 5]
    assert "cannot be recorded" in caplog.text
