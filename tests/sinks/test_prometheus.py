"""The page a Prometheus server fetches, and a real server that fetches it."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.errors import ConfigurationError
from gradwatch.records import ActionRecord, Finding, Parameter, RunInfo, StepBatch
from gradwatch.sinks import Prometheus
from gradwatch.sinks.prometheus import DASHBOARD_FILE, RULES_FILE
from gradwatch.testing import synthetic_batches, synthetic_parameters
from gradwatch.watcher import Watcher

pytestmark = pytest.mark.needs("prometheus")
INFO = RunInfo((), host="gpu7", framework="torch", pid=1)
EXPLODING = Finding("exploding@5", "exploding", "critical", 5, 7)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[Prometheus]:
    sink = Prometheus(port=0, **settings)
    sink.open(INFO, folder / "mnist")
    try:
        yield sink
    finally:
        sink.close()


def scrape(sink: Prometheus) -> Samples:
    """What the page says, read by the client library's own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def step(number: int, norms: list[float], **metrics: float) -> StepBatch:
    parameters = tuple(Parameter(f"layer{i}.weight", depth=i) for i in range(len(norms)))
    given = {"time": time.time(), "step_time": 0.5, "skipped": 0.0, **metrics}
    numbers = {name: np.array([value]) for name, value in given.items()}
    return StepBatch(parameters, np.array([number]), np.array([norms], np.float32), numbers)


def test_the_page_shows_the_last_step(tmp_path: Path) -> None:
    with served(tmp_path) as sink:
        sink.steps(step(7, [3.0, 4.0], loss=0.7, global_norm=5.0, lr=0.1, lr_factor=0.5, clip_coefficient=1.0))
        sink.steps(step(8, [6.0, 8.0], loss=0.6, global_norm=10.0, lr=0.1, skipped=1.0))
        shown = scrape(sink)

    expected = {
        "gradwatch_step": 8, "gradwatch_steps_total": 2, "gradwatch_skipped_steps_total": 1, "gradwatch_loss": 0.6,
        "gradwatch_gradient_norm": 10, "gradwatch_learning_rate": 0.1, "gradwatch_step_seconds": 0.5,
    }  # fmt: skip
    assert {name: shown[name, ()] for name in expected} == expected
    assert shown["gradwatch_layer_gradient_norm", (("layer", "layer1"),)] == 8.0
    assert abs(shown["gradwatch_last_step_timestamp_seconds", ()] - time.time()) < 60
    assert ("gradwatch_learning_rate_factor", ()) not in shown


def test_findings_and_actions_are_counted_once_each(tmp_path: Path) -> None:
    kind = (("rule", "exploding"), ("severity", "critical"))
    with served(tmp_path) as sink:
        for _ in range(3):
            sink.finding(EXPLODING)
        sink.action(ActionRecord("1", 8, "DecayLR"))
        sink.action(ActionRecord("1", 8, "DecayLR", outcome="helped"))
        sink.action(ActionRecord("2", 8, "Clip", dry_run=True))
        shown = scrape(sink)
        assert (shown["gradwatch_findings_total", kind], shown["gradwatch_findings_open", kind]) == (1, 1)
        assert {key: n for key, n in shown.items() if key[0] == "gradwatch_actions_total"} == {
            ("gradwatch_actions_total", (("action", "DecayLR"),)): 1
        }
        sink.finding(Finding("exploding@5", "exploding", "critical", 5, 7, resolved_step=9))
        shown = scrape(sink)

    assert (shown["gradwatch_findings_total", kind], shown["gradwatch_findings_open", kind]) == (1, 0)


def test_a_norm_that_is_not_finite_is_shown_as_such(tmp_path: Path) -> None:
    with served(tmp_path) as sink:
        sink.steps(step(7, [math.nan, 4.0], global_norm=math.nan, loss=math.inf))
        shown = scrape(sink)

    assert math.isnan(shown["gradwatch_gradient_norm", ()])
    assert shown["gradwatch_loss", ()] == math.inf


def test_the_number_of_series_is_bounded(tmp_path: Path) -> None:
    with served(tmp_path, max_layers=20) as sink:
        for batch in synthetic_batches(steps=3, parameters=2000):
            sink.steps(batch)
        for i in range(20_000):
            sink.finding(Finding(f"rule{i}@1", f"rule{i}", "critical", 1, 1))
            sink.action(ActionRecord(str(i), 8, f"Action{i}"))
        shown = scrape(sink)

    layers = [labels[0][1] for name, labels in shown if name == "gradwatch_layer_gradient_norm"]
    assert (len(layers), layers[0], layers[-1]) == (20, "layers.0", "layers.999")
    assert len(shown) < 700


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    with served(tmp_path) as sink:
        shown = scrape(sink)

    assert shown["gradwatch_steps_total", ()] == 0
    assert [dict(labels)["run"] for name, labels in shown if name == "gradwatch_run_info"] == ["mnist"]


def test_it_serves_one_run_at_a_time_and_then_the_next(tmp_path: Path) -> None:
    with served(tmp_path) as sink:
        sink.steps(step(7, [1.0]))
        with pytest.raises(ConfigurationError, match="serves another run"):
            sink.open(INFO, tmp_path)
    sink.open(INFO, tmp_path)
    assert scrape(sink)["gradwatch_steps_total", ()] == 0
    sink.close()
    sink.close()


def test_a_port_that_is_taken_harms_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Watcher(synthetic_parameters(2), run_dir=tmp_path / "run", sinks=[Prometheus(port)]) as watcher:
            watcher.observe(grad_norm=np.ones(2))

    assert "Prometheus" in watcher.faults.counts
    assert "switched off; training goes on" in caplog.text


def shipped_names() -> set[str]:
    """The metrics that the shipped files speak of."""
    text = RULES_FILE.read_text() + DASHBOARD_FILE.read_text()
    return set(re.findall(r"\bgradwatch_\w+", text))


def test_the_shipped_files_speak_of_metrics_that_there_are(tmp_path: Path) -> None:
    with served(tmp_path) as sink:
        sink.steps(step(7, [1.0], loss=0.7, global_norm=5.0, lr=0.1, lr_factor=0.5, clip_coefficient=1.0))
        sink.finding(EXPLODING)
        sink.action(ActionRecord("1", 8, "DecayLR"))
        shown = {name for name, _ in scrape(sink)}

    assert shipped_names() <= shown


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD_FILE.read_text())

    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)\}?", json.dumps([panel["targets"] for panel in panels]))) <= variables
    places = {(x, y) for panel in panels for x, y in _cells(panel["gridPos"])}
    assert len(places) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in panels)
    assert max(x for x, _ in places) < 24


def _cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


# -- a real server ---------------------------------------------------------------------------------------------------


class Server:
    """A Prometheus server that fetches one page every 200 ms and evaluates the shipped rules as often."""

    def __init__(self, folder: Path, target: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        config = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
            "rule_files": [str(RULES_FILE)],
            "scrape_configs": [{"job_name": "gradwatch", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        program = shutil.which("prometheus")
        assert program is not None
        self._process = subprocess.Popen(
            [
                program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def wait_for(self, path: str, accept: Any, **query: str) -> Any:
        """The first answer that is accepted."""
        end, last = time.monotonic() + 60, None
        while time.monotonic() < end:
            try:
                last = self.ask(path, **query)
                if accept(last):
                    return last
            except OSError as error:
                last = error
            time.sleep(0.2)
        raise AssertionError(f"{path} {query}: {last}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Prometheus]:
    with served(tmp_path) as sink:
        yield sink


@pytest.fixture
def server(tmp_path: Path, exporter: Prometheus) -> Iterator[Server]:
    made = Server(tmp_path, exporter.port)
    yield made
    made.close()


def firing(name: str) -> Any:
    return lambda data: [a for a in data["alerts"] if a["labels"]["alertname"] == name and a["state"] == "firing"]


@pytest.mark.server("prometheus")
def test_a_real_server_fetches_the_numbers(server: Server, exporter: Prometheus) -> None:
    exporter.steps(step(8, [3.0, 4.0], loss=0.7, global_norm=5.0, lr=0.1, lr_factor=0.5, clip_coefficient=1.0))
    exporter.finding(EXPLODING)
    exporter.action(ActionRecord("1", 8, "DecayLR"))

    found = server.wait_for("query", lambda data: data["result"], query="gradwatch_gradient_norm")
    assert found["result"][0]["value"][1] == "5"
    names = set(server.wait_for("label/__name__/values", lambda names: shipped_names() <= set(names)))
    assert shipped_names() <= names


@pytest.mark.server("prometheus")
def test_the_shipped_rule_fires_for_a_critical_finding_and_ends_with_it(server: Server, exporter: Prometheus) -> None:
    exporter.steps(step(8, [3.0], loss=0.7, global_norm=5.0))
    exporter.finding(EXPLODING)
    alerts = server.wait_for("alerts", firing("GradwatchCritical"))["alerts"]
    assert {alert["labels"]["rule"] for alert in alerts} == {"exploding"}

    exporter.finding(Finding("exploding@5", "exploding", "critical", 5, 7, resolved_step=9))
    server.wait_for("alerts", lambda data: not firing("GradwatchCritical")(data))


@pytest.mark.server("prometheus")
def test_the_shipped_rule_fires_when_steps_stop(server: Server, exporter: Prometheus) -> None:
    exporter.steps(step(8, [3.0], loss=0.7, global_norm=5.0, time=time.time() - 61))

    server.wait_for("alerts", firing("GradwatchStalled"))


@pytest.mark.server("prometheus")
def test_every_expression_of_the_dashboard_is_understood(server: Server) -> None:
    server.wait_for("status/buildinfo", bool)
    for panel in json.loads(DASHBOARD_FILE.read_text())["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$job", ".*").replace("$instance", ".*")
            assert server.ask("query", query=query)["resultType"] in ("vector", "scalar"), query
