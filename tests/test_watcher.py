import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.actions import DecayLR
from gradwatch.detectors.base import RunContext
from gradwatch.detectors.engine import Engine, replay
from gradwatch.errors import ConfigurationError, RunExistsError, RunLockedError, WatcherClosedError
from gradwatch.provenance import default_run_dir
from gradwatch.reader import RunReader
from gradwatch.records import NOT_MEASURED, Parameter, RunInfo
from gradwatch.rows import global_norm
from gradwatch.sinks.base import Sink
from gradwatch.sinks.rows import Row
from gradwatch.watcher import Watcher

PARAMETERS = (Parameter("conv.weight", depth=0), Parameter("fc.weight", depth=1), Parameter("fc.bias", depth=1))


def watcher_of(run_dir: Path, **settings: Any) -> Watcher:
    return Watcher(PARAMETERS, run_dir=run_dir, **settings)


def feed(watcher: Watcher, steps: int, *, growth: float = 1.0, seed: int = 0) -> None:
    """Noisy norms that grow by a factor a step."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        watcher.observe(grad_norm=growth**step * rng.lognormal(0.0, 0.1, 3), loss=growth**step, lr=0.1)


def test_observed_norms_and_metrics_are_recorded(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        watcher.observe(grad_norm=np.array([3.0, 4.0, NOT_MEASURED]), loss=0.7, lr=0.1, accuracy=0.5)

    run = RunReader(run_dir)
    np.testing.assert_array_equal(run.grad_norms().to_numpy(), [[3.0, 4.0, np.nan]])
    metrics = run.metrics().iloc[0]
    assert [metrics[name] for name in ("loss", "lr", "accuracy", "global_norm", "skipped")] == [0.7, 0.1, 0.5, 5.0, 0.0]
    assert run.info.status == "finished"


def test_steps_are_numbered_from_zero_and_may_jump(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        watcher.observe(grad_norm=[1.0, 1.0, 1.0])
        watcher.observe(grad_norm=[1.0, 1.0, 1.0], step=7)
        watcher.observe(grad_norm=[1.0, 1.0, 1.0])

    assert list(RunReader(run_dir).steps) == [0, 7, 8]


def test_logged_numbers_belong_to_the_step_that_closes_next(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        watcher.log(loss=1.5)
        watcher.observe(grad_norm=[1.0, 1.0, 1.0])
        watcher.observe(grad_norm=[1.0, 1.0, 1.0])

    loss = RunReader(run_dir).metrics()["loss"]
    assert loss[0] == 1.5
    assert math.isnan(loss[1])


@pytest.mark.parametrize("check_every", [1, 7, 64])
def test_findings_do_not_depend_on_how_often_is_looked(tmp_path: Path, check_every: int) -> None:
    watchers = [watcher_of(tmp_path / name, check_every=n) for name, n in (("a", 1), ("b", check_every))]
    for watcher in watchers:
        feed(watcher, 120, growth=1.05)
        watcher.close()

    assert watchers[0].findings
    assert watchers[0].findings == watchers[1].findings


def test_asking_for_findings_looks_at_steps_that_wait_for_company(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        watcher.observe(grad_norm=[1.0, 1.0, math.nan])

        assert [finding.rule for finding in watcher.findings] == ["nonfinite"]


def test_a_slow_step_is_looked_at_at_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwatch.watcher.LATEST", 0.0)
    with watcher_of(run_dir) as watcher:
        watcher.observe(grad_norm=[1.0, 1.0, math.nan])

        assert len(watcher.monitor.findings) == 1


def test_steps_that_wait_for_company_reach_the_disk_in_a_pause(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwatch.watcher.LATEST", math.inf)
    with watcher_of(run_dir, flush_seconds=0.05) as watcher:
        for _ in range(3):
            watcher.observe(grad_norm=[1.0, 1.0, 1.0])
        patience = time.monotonic() + 20
        while len(RunReader(run_dir).steps) < 3 and time.monotonic() < patience:
            time.sleep(0.02)
        watcher.observe(grad_norm=[1.0, 1.0, 1.0])

        assert list(RunReader(run_dir).steps) == [0, 1, 2]

    assert list(RunReader(run_dir).steps) == [0, 1, 2, 3]


def test_live_findings_equal_those_of_a_replay(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        feed(watcher, 200, growth=1.05)

    run = RunReader(run_dir)
    engine = Engine.from_config(run.info.config["detectors"], RunContext(run.info.parameters))
    assert watcher.findings
    assert {f.id: f for f in replay(run.batches(size=33), engine)} == {f.id: f for f in watcher.findings}
    assert {f.id: f for f in run.finding_list()} == {f.id: f for f in watcher.findings}


def test_a_due_action_is_returned_and_recorded_once_applied(run_dir: Path) -> None:
    with watcher_of(run_dir, actions=[DecayLR(factor=0.5, on="exploding")]) as watcher:
        due = []
        for step in range(120):
            due = watcher.observe(grad_norm=np.full(3, 1.5**step), loss=1.0)
            if due:
                watcher.applied(due[0])
                break

    (action,) = RunReader(run_dir).action_list()
    assert (action.action, action.reason, action.before, action.after) == ("DecayLR", "exploding", 1.0, 0.5)


def test_state_goes_on_in_another_watcher(tmp_path: Path) -> None:
    whole, first = watcher_of(tmp_path / "whole"), watcher_of(tmp_path / "first")
    rng = np.random.default_rng(0)
    norms = [1.05**step * rng.lognormal(0.0, 0.1, 3) for step in range(150)]
    for norm in norms:
        whole.observe(grad_norm=norm)
    for norm in norms[:60]:
        first.observe(grad_norm=norm)
    second = watcher_of(tmp_path / "second")
    second.load_state_dict(first.state_dict())
    for norm in norms[60:]:
        second.observe(grad_norm=norm)
    for watcher in (whole, first, second):
        watcher.close()

    assert {f.id for f in whole.findings} == {f.id for f in first.findings} | {f.id for f in second.findings}
    assert whole.findings[-1] == second.findings[-1]


def test_a_failing_detector_is_switched_off_and_the_rest_goes_on(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> list[Any]:
        raise RuntimeError("mine")

    with watcher_of(run_dir, detectors=["exploding", broken]) as watcher:
        feed(watcher, 120, growth=1.5)

    assert {f.rule for f in watcher.findings} == {"exploding"}
    assert len(caplog.records) == 1
    assert "mine" in str(RunReader(run_dir).info.overhead["errors"])


def test_of_two_sinks_of_one_kind_only_the_one_that_fails_is_switched_off(run_dir: Path) -> None:
    class Told(Sink):
        heard = 0

        def begin(self, info: RunInfo, run_dir: Path) -> None: ...

        def write(self, rows: list[Row]) -> None:
            self.heard += len(rows)

        def end(self, status: str) -> None: ...

    broken, whole = Told(), Told()
    broken.steps = None  # type: ignore[method-assign, assignment]
    watcher = watcher_of(run_dir, sinks=[broken, whole])
    feed(watcher, 5)
    watcher.close()

    assert (broken.heard, whole.heard) == (0, 5)
    assert watcher.overhead()["failures"] == {"Told": 1}


def test_a_failure_of_ours_stays_out_of_observe_and_misuse_is_raised(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watcher_of(run_dir)
    with pytest.raises(ConfigurationError, match="'loss' must be a number or a scalar tensor: 'low'"):
        watcher.observe(grad_norm=[1.0, 2.0, 3.0], loss="low")  # type: ignore[arg-type]
    monkeypatch.setattr(watcher, "_close_row", None)

    assert watcher.observe(grad_norm=[1.0, 2.0, 3.0], loss=1.0) == []
    assert watcher.overhead()["failures"] == {"observe": 1}
    watcher.close()


def test_own_cost_is_in_the_record(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        feed(watcher, 10)

    overhead = RunReader(run_dir).info.overhead
    assert overhead["steps"] == 10
    assert overhead["bytes_written"] > 0
    assert overhead["errors"] == {}


def test_an_exception_in_the_with_block_is_the_reason_of_the_crash(run_dir: Path) -> None:
    with pytest.raises(KeyError), watcher_of(run_dir) as watcher:  # noqa: PT012 -- the exit is what is tested
        feed(watcher, 3)
        raise KeyError("batch")

    info = RunReader(run_dir).info
    assert (info.status, info.status_detail) == ("crashed", "KeyError: 'batch'")


SCRIPT = """
import sys, numpy as np
from gradwatch.records import Parameter
from gradwatch.watcher import Watcher
watcher = Watcher([Parameter("fc.weight")], run_dir=sys.argv[1])
for step in range(5):
    watcher.observe(grad_norm=np.ones(1))
{last}
"""


@pytest.mark.parametrize(
    ("last", "expected"),
    [("", ("finished", "")), ("raise ValueError('bad batch')", ("crashed", "ValueError: bad batch"))],
)
def test_a_script_that_ends_without_close_leaves_a_whole_run(
    run_dir: Path, last: str, expected: tuple[str, str]
) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT.format(last=last), str(run_dir)], capture_output=True, check=False)

    run = RunReader(run_dir)
    assert len(run.steps) == 5
    assert (run.info.status, run.info.status_detail) == expected


def test_a_forked_child_does_not_close_the_run(run_dir: Path) -> None:
    watcher = watcher_of(run_dir)
    feed(watcher, 3)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        watcher.close()
        os.write(write, b"done")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 4) == b"done"
    os.close(read)
    os.close(write)
    feed(watcher, 3)
    watcher.close()

    assert len(RunReader(run_dir).steps) == 6


def test_a_closed_watcher_says_so(run_dir: Path) -> None:
    watcher = watcher_of(run_dir)
    watcher.close()
    watcher.close()

    with pytest.raises(WatcherClosedError, match=r"the watcher of '.*run' is closed"):
        watcher.log(loss=1.0)


def test_a_directory_in_use_names_the_process(run_dir: Path) -> None:
    watcher = watcher_of(run_dir)

    with pytest.raises(RunLockedError, match=str(os.getpid())):
        watcher_of(run_dir, resume=True)
    watcher.close()


def test_a_finished_run_is_not_overwritten_unasked(run_dir: Path) -> None:
    watcher_of(run_dir).close()

    with pytest.raises(RunExistsError, match="overwrite=True"):
        watcher_of(run_dir)
    watcher_of(run_dir, overwrite=True).close()


def test_resume_goes_on_after_the_last_step(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        feed(watcher, 4)
    with watcher_of(run_dir, resume=True) as watcher:
        feed(watcher, 2)

    assert list(RunReader(run_dir).steps) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stats_every": 0}, r"'stats_every' must be an integer >= 1: 0"),
        ({"flush_every": 2.5}, r"'flush_every' must be an integer >= 1: 2.5"),
        ({"flush_seconds": 0.0}, r"'flush_seconds' must be > 0: 0.0"),
        ({"resume": True, "overwrite": True}, r"'resume' and 'overwrite' exclude each other"),
        ({"actoins": []}, r"unknown setting 'actoins'; did you mean 'actions'\?"),
        ({"detectors": ["explodng"]}, r"unknown rule 'explodng'; did you mean 'exploding'\?"),
        ({"actions": ["clip"]}, r"'actions' must be a list of gradwatch actions: 'clip'"),
    ],
)
def test_wrong_settings_are_refused_at_the_call(run_dir: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        watcher_of(run_dir, **settings)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad_norm": [1.0]}, r"'grad_norm' must be of shape \(3,\): \(1,\)"),
        ({"grad_norm": [1.0] * 3, "stage": "mid_clip"}, r"unknown stage 'mid_clip'"),
        ({"grad_norm": [1.0] * 3, "step": -1}, r"'step' must be >= 0 \(steps ascend\): -1"),
        ({"grad_norm": [1.0] * 3, "statistics": {"norm": np.ones(3)}}, r"unknown statistic 'norm'"),
        ({"grad_norm": [1.0] * 3, "statistics": {"weight_norm": np.ones(2)}}, r"must be of shape \(3,\): \(2,\)"),
    ],
)
def test_wrong_observations_are_refused(run_dir: Path, arguments: dict[str, Any], message: str) -> None:
    with watcher_of(run_dir) as watcher, pytest.raises(ConfigurationError, match=message):
        watcher.observe(**arguments)


def test_something_else_than_a_number_cannot_be_logged(run_dir: Path) -> None:
    with (
        watcher_of(run_dir) as watcher,
        pytest.raises(ConfigurationError, match=r"'loss' must be a number or a scalar"),
    ):
        watcher.log(loss="high")


def test_two_parameters_of_one_name_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="two parameters are named 'a'"):
        Watcher([Parameter("a"), Parameter("a")], run_dir=run_dir)


def test_no_parameters_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"at least one gradwatch\.Parameter"):
        Watcher([], run_dir=run_dir)


def test_statistics_are_recorded_at_their_step(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        watcher.observe(grad_norm=[1.0] * 3)
        watcher.observe(grad_norm=[1.0] * 3, statistics={"weight_norm": np.array([5.0, 6.0, 7.0])})

    weights = RunReader(run_dir).statistic("weight_norm")
    np.testing.assert_array_equal(weights.loc[1], [5.0, 6.0, 7.0])


def test_global_norm_of_nothing_is_not_measured() -> None:
    assert global_norm(np.array([NOT_MEASURED])) == NOT_MEASURED


def test_repr_tells_what_is_going_on(run_dir: Path) -> None:
    with watcher_of(run_dir) as watcher:
        feed(watcher, 2)
        assert repr(watcher) == f"<Watcher watching 3 parameters, 2 steps, 0 findings, run_dir={str(run_dir)!r}>"


def test_default_run_dir_names_the_process() -> None:
    assert default_run_dir().parts[0] == "runs"
    assert default_run_dir().name.endswith(f"-{os.getpid()}")


def test_a_watcher_shows_the_verdict_of_its_run_in_a_notebook(run_dir: Path) -> None:
    watcher = watcher_of(run_dir, flush_every=1)
    feed(watcher, 5)
    watcher.close()

    assert "5 steps without a finding" in watcher._repr_html_()
