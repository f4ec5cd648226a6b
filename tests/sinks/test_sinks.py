"""What every sink keeps to, read back with the tool itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gradwatch import sinks
from gradwatch.errors import ConfigurationError, MissingDependencyError, UnknownNameError
from gradwatch.records import NOT_MEASURED, ActionRecord, Finding, Parameter, RunInfo
from gradwatch.sinks import base
from gradwatch.sinks.heatmap import MOST_COLUMNS, Heatmap
from gradwatch.sinks.rows import Row, Table
from gradwatch.testing import synthetic_batches
from gradwatch.watcher import Watcher
from tests.sinks import wandb_file

PARAMETERS = (
    Parameter("conv.weight", depth=0),
    Parameter("fc.weight", depth=1),
    Parameter("fc.bias", depth=1),
)
INFO = RunInfo(PARAMETERS, host="gpu7", pid=1)
STEPS = 20

#: Step to number, by name as the tool shows it.
Series = dict[str, dict[int, float]]


@dataclass
class Rig:
    """A sink, how its tool names the numbers, and how to read them back."""

    sink: Any
    name: Callable[[str, str], str]
    read: Callable[[], Series]


@pytest.fixture(autouse=True)
def tools_on_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))  # it reads without TensorFlow
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its databases need more than the extra brings
    monkeypatch.setenv("WANDB_SILENT", "true")


@contextmanager
def tensorboard(folder: Path, **settings: Any) -> Iterator[Rig]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> Series:
        events: Any = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    yield Rig(sinks.TensorBoard(folder / "tb", **settings), lambda family, name: f"{family}/{name}", read)


def mlflow_run(folder: Path) -> tuple[Any, str, str]:
    """A client, a run, and the address of a store on this machine."""
    from mlflow import MlflowClient

    uri = (folder / "mlruns").as_uri()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("test", artifact_location=str(folder / "artifacts"))
    return client, client.create_run(experiment).info.run_id, uri


@contextmanager
def mlflow(folder: Path, **settings: Any) -> Iterator[Rig]:
    client, run_id, uri = mlflow_run(folder)

    def read() -> Series:
        names = client.get_run(run_id).data.metrics
        return {name: {m.step: m.value for m in client.get_metric_history(run_id, name)} for name in names}

    yield Rig(sinks.MLflow(run_id, tracking_uri=uri, **{"every": 1, **settings}), _prefixed, read)


@contextmanager
def wandb(folder: Path, **settings: Any) -> Iterator[Rig]:
    import wandb as library

    run: Any = library.init(mode="offline", dir=str(folder), project="test")

    def read() -> Series:
        run.finish()
        return _offline_series(folder)

    yield Rig(sinks.WandB(run, **{"every": 1, **settings}), _prefixed, read)
    run.finish()


def _prefixed(family: str, name: str) -> str:
    return f"gradwatch/{name}" if family == "metrics" else f"gradwatch/{family}/{name}"


def _offline_series(folder: Path) -> Series:
    series: Series = {}
    for record in wandb_file.records(folder):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if "gradwatch/step" in row and isinstance(value, (int, float)):
                series.setdefault(name, {})[row["gradwatch/step"]] = value
    return series


MIRRORS = [pytest.param(make, marks=pytest.mark.needs(make.__name__)) for make in (tensorboard, mlflow, wandb)]


@pytest.fixture(params=MIRRORS)
def rig_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    def make(**settings: Any) -> Any:
        return request.param(tmp_path, **settings)

    return make


def train(run_dir: Path, sink: Any, steps: int = STEPS) -> Watcher:
    with Watcher(PARAMETERS, run_dir=run_dir, sinks=[sink]) as watcher:
        for step in range(steps):
            ratio = {"update_ratio": np.array([1e-3, 2e-3, 3e-3], np.float32)} if step % 10 == 0 else None
            norms = np.array([3.0, 4.0 + step, NOT_MEASURED if step == 5 else 1.0], np.float32)
            watcher.observe(grad_norm=norms, loss=1.0 / (1 + step), statistics=ratio, lr=0.1)
    return watcher


def test_what_is_mirrored_equals_the_record(rig_of: Any, tmp_path: Path) -> None:
    with rig_of() as rig:
        watcher = train(tmp_path / "run", rig.sink)
        series = rig.read()

    assert watcher.faults.counts == {}
    fc = {step: math.hypot(4.0 + step, 0.0 if step == 5 else 1.0) for step in range(STEPS)}
    assert series[rig.name("grad_norm", "fc")] == pytest.approx(fc)
    assert series[rig.name("metrics", "loss")] == pytest.approx({step: 1.0 / (1 + step) for step in range(STEPS)})
    assert series[rig.name("metrics", "global_norm")] == pytest.approx({s: math.hypot(3.0, fc[s]) for s in fc})
    assert series[rig.name("update_ratio", "fc")] == pytest.approx({0: 3e-3, 10: 3e-3})


def test_every_thins_but_keeps_sampled_statistics(rig_of: Any, tmp_path: Path) -> None:
    with rig_of(every=7) as rig:
        train(tmp_path / "run", rig.sink)
        series = rig.read()

    assert sorted(series[rig.name("grad_norm", "conv")]) == [0, 7, 14]
    assert sorted(series[rig.name("update_ratio", "conv")]) == [0, 10]


def test_by_parameter_shows_each_parameter(rig_of: Any, tmp_path: Path) -> None:
    with rig_of(by="parameter") as rig:
        train(tmp_path / "run", rig.sink)
        series = rig.read()

    assert len(series[rig.name("grad_norm", "fc.weight")]) == STEPS
    assert len(series[rig.name("grad_norm", "fc.bias")]) == STEPS - 1


def test_numbers_that_are_not_finite_are_mirrored(rig_of: Any, tmp_path: Path) -> None:
    with rig_of() as rig:
        with Watcher(PARAMETERS, run_dir=tmp_path / "run", sinks=[rig.sink]) as watcher:
            watcher.observe(grad_norm=np.ones(3), loss=1.0)
            watcher.observe(grad_norm=np.array([1.0, np.nan, 1.0]), loss=math.inf)
            watcher.observe(grad_norm=np.ones(3), loss=2.0)
        series = rig.read()

    assert watcher.faults.counts == {}
    assert rig.sink.dropped == 0
    assert series[rig.name("metrics", "loss")][2] == 2.0


def test_a_sink_serves_one_run_at_a_time(rig_of: Any, tmp_path: Path) -> None:
    with rig_of() as rig:
        rig.sink.open(INFO, tmp_path)
        with pytest.raises(ConfigurationError, match="serves another run: give each run a sink of its own"):
            rig.sink.open(INFO, tmp_path)
        rig.sink.close()
        rig.sink.close()


@pytest.mark.needs("tensorboard")
def test_tensorboard_shows_findings_actions_and_a_heatmap(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = sinks.TensorBoard(tmp_path / "tb")
    sink.open(INFO, tmp_path / "run")
    for batch in synthetic_batches(steps=50, parameters=6):
        sink.steps(batch)
    sink.finding(Finding("exploding@5", "exploding", "critical", 5, 7, message="It explodes.", advice=("Clip it.",)))
    sink.action(ActionRecord("1", 8, "DecayLR", detail="learning rate x 0.5"))
    sink.close()
    events: Any = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()

    [finding] = events.Tensors("findings/exploding")
    assert b"It explodes." in finding.tensor_proto.string_val[0]
    assert b"learning rate x 0.5" in events.Tensors("actions/DecayLR")[0].tensor_proto.string_val[0]
    image = events.Images("heatmap/grad_norm")[-1]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert (image.width, image.height) == (300, 18)


@pytest.mark.needs("tensorboard")
def test_tensorboard_brings_no_tensorflow() -> None:
    code = (
        "import sys, gradwatch as gw; gw.sinks.TensorBoard('x'); print(*({'tensorflow', 'torch'} & sys.modules.keys()))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert printed.stdout.split() == []


@pytest.mark.needs("mlflow")
def test_mlflow_gets_events_and_tags(tmp_path: Path) -> None:
    client, run_id, uri = mlflow_run(tmp_path)
    sink = sinks.MLflow(run_id, tracking_uri=uri)
    sink.open(INFO, tmp_path / "run")
    sink.finding(Finding("exploding@5", "exploding", "critical", 5, 7))
    sink.finding(Finding("exploding@5", "exploding", "critical", 5, 9, resolved_step=9))
    sink.close("crashed")

    run = client.get_run(run_id)
    assert run.data.tags["gradwatch.status"] == "crashed"
    events = json.loads(Path(run.info.artifact_uri, "gradwatch/events.json").read_text())
    assert [event["resolved_step"] for event in events["events"]] == [9]


class Slow(sinks.Sink):
    """A tool that hangs until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self.rows: list[Row] = []
        self.fails = 0

    def begin(self, info: RunInfo, run_dir: Path) -> None: ...

    def write(self, rows: list[Row]) -> None:
        self.released.wait(30)
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no route")
        self.rows += rows

    def end(self, status: str) -> None: ...


def one_by_one(count: int) -> Iterator[Any]:
    for batch in synthetic_batches(steps=count, parameters=2):
        yield from batch.split(1)


def test_a_tool_that_hangs_loses_steps_and_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MOST_WAITING", 100)
    sink = Slow()
    sink.open(INFO, tmp_path)
    for batch in one_by_one(5000):
        sink.steps(batch)
    sink.released.set()
    sink.close()

    assert sink.dropped > 0
    assert len(sink.rows) + sink.dropped == 5000


def test_closing_does_not_wait_for_a_tool_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(base, "PAUSE", 0.01)
    sink = Slow()
    sink.open(INFO, tmp_path)
    sink.steps(next(one_by_one(1)))
    time.sleep(0.1)
    sink.close()
    sink.released.set()

    assert "did not answer in time" in caplog.text
    while any(thread.name == "gradwatch-Slow" for thread in threading.enumerate()):
        time.sleep(0.01)


def test_a_tool_that_fails_on_and_on_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "PAUSE", 0.001)
    sink = Slow()
    sink.released.set()
    sink.fails = 10**9
    sink.open(INFO, tmp_path)
    for batch in one_by_one(50):
        sink.steps(batch)
        time.sleep(0.005)
    sink.close()

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "failed (ConnectionError: no route)" in lines[0]
    assert "failed and is switched off" in lines[1]
    assert sink.dropped == 50


def test_only_rank_zero_mirrors(tmp_path: Path) -> None:
    sink = Slow()
    sink.open(RunInfo(PARAMETERS, rank=1), tmp_path)
    sink.steps(next(one_by_one(1)))
    sink.close()

    assert sink.rows == []


def test_a_heatmap_keeps_a_bounded_number_of_columns_and_colours_what_is_not_finite() -> None:
    heatmap = Heatmap()
    for step in range(20 * MOST_COLUMNS):
        heatmap.add({"a": 1.0 + step, "b": math.nan if step == 0 else 0.0})

    assert len(heatmap._columns) < MOST_COLUMNS
    colours = heatmap._colours()
    assert tuple(colours[1, 0]) == (214, 39, 40)
    assert tuple(colours[1, 1]) == (238, 238, 238)


def test_rows_of_modules_and_layers() -> None:
    [batch] = synthetic_batches(steps=4, parameters=4, statistics=["weight_norm", "grad_max"], stats_every=2)
    rows = list(Table("layer").rows(batch, 3))

    assert [row.step for row in rows] == [0, 2, 3]
    weight = batch.statistics["weight_norm"].values[0]
    assert rows[0].values["weight_norm", "layers.0"] == pytest.approx(math.hypot(weight[0], weight[1]))
    assert rows[0].values["grad_max", "layers.1"] == max(batch.statistics["grad_max"].values[0][2:])
    assert {family for family, _ in rows[1].values} == {"weight_norm", "grad_max"}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: sinks.TensorBoard("x", every=0), ConfigurationError, "'every' must be an integer >= 1: 0"),
        (lambda: sinks.TensorBoard("x", by="leyer"), UnknownNameError, "did you mean 'layer'"),
        (lambda: sinks.Prometheus(port=70000), ConfigurationError, "'port' must be an integer from 0 to 65535: 70000"),
        (lambda: sinks.Prometheus(max_layers=-1), ConfigurationError, "'max_layers' must be an integer >= 0: -1"),
        (lambda: sinks.checked_sinks([sinks.TensorBoard]), ConfigurationError, r"write TensorBoard\(...\)"),
        (lambda: sinks.checked_sinks("tensorboard"), ConfigurationError, "'sinks' must be a list of sinks"),
    ],
)
def test_bad_input_is_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [
        (lambda: sinks.TensorBoard("x"), "tensorboard.compat.proto", "tensorboard"),
        (sinks.WandB, "wandb", "wandb"),
        (sinks.MLflow, "mlflow", "mlflow"),
        (sinks.Prometheus, "prometheus_client", "prometheus"),
    ],
)
def test_a_missing_extra_says_how_to_get_it(
    make: Any, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "gradwatch\[{extra}\]"'):
        make()


@pytest.mark.needs("wandb")
def test_wandb_without_a_run_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"no W&B run is active: call wandb.init\(\) first"):
        sinks.WandB()


@pytest.mark.needs("mlflow")
def test_mlflow_without_a_run_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"no MLflow run is active: call mlflow.start_run\(\) first"):
        sinks.MLflow()
