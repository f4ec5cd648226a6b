"""Alerts of a watcher: from a step that goes wrong to the message, and into the record."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from gradwatch.alerts import Message
from gradwatch.errors import ConfigurationError
from gradwatch.records import Finding, Parameter, RunInfo, StepBatch
from gradwatch.watcher import Watcher
from tests.alerts.receivers import Collector

PARAMETERS = [Parameter("conv.weight", depth=0), Parameter("fc.weight", depth=1)]


def explode(watcher: Watcher) -> None:
    for step in range(120):
        watcher.observe(grad_norm=np.full(2, 1.2 ** max(0, step - 60)), loss=1.0)


def test_an_explosion_is_told_and_noted_in_the_record(run_dir: Path) -> None:
    collector = Collector()
    with Watcher(PARAMETERS, run_dir=run_dir, alerts=[collector]) as watcher:
        explode(watcher)
        told = {finding.rule for finding in watcher.findings if finding.severity != "info"}

    assert told
    assert told <= {group.rule for message in collector.messages for group in message.groups}
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    sent = [event for event in events if event["kind"] == "alert"]
    assert [event["id"] for event in sent] == [message.id for message in collector.messages]
    assert all(message.run == "run" and message.run_dir == str(run_dir) for message in collector.messages)


def test_a_function_is_a_channel(run_dir: Path) -> None:
    got: list[Message] = []
    with Watcher(PARAMETERS, run_dir=run_dir, alerts=[got.append]) as watcher:
        explode(watcher)

    assert got


def train_into_an_error(run_dir: Path, collector: Collector) -> None:
    with Watcher(PARAMETERS, run_dir=run_dir, alerts=[collector]) as watcher:
        watcher.observe(grad_norm=np.ones(2))
        raise RuntimeError("out of memory")


def test_an_error_in_the_training_is_told(run_dir: Path) -> None:
    collector = Collector()
    with pytest.raises(RuntimeError, match="out of memory"):
        train_into_an_error(run_dir, collector)

    assert collector.messages[0].groups[0].message == "Training ended by an error: RuntimeError: out of memory"


def test_a_channel_that_always_fails_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Message) -> None:
        raise RuntimeError("no way")

    records = []
    for name, alerts in (("with", [broken]), ("without", [])):
        with Watcher(PARAMETERS, run_dir=tmp_path / name, alerts=alerts) as watcher:
            explode(watcher)
        assert watcher.faults.counts == {}
        records.append(watcher.findings)

    assert records[0] == records[1]
    assert "no way" in caplog.text
    assert all(record.levelno <= logging.WARNING for record in caplog.records)


def test_a_listener_that_breaks_is_switched_off_and_the_others_go_on(run_dir: Path) -> None:
    class Broken:
        def open(self, info: RunInfo, run_dir: Path, **_: object) -> None: ...
        def steps(self, batch: StepBatch) -> None:
            raise RuntimeError("broken")

        def finding(self, finding: Finding) -> None: ...
        def action(self, record: object) -> None: ...
        def close(self, status: str, detail: str) -> None: ...

    collector = Collector()
    with Watcher(PARAMETERS, run_dir=run_dir, alerts=[Broken(), collector]) as watcher:
        explode(watcher)

    assert watcher.faults.counts["Broken"] == 1
    assert collector.messages


def test_a_bad_channel_is_named_before_anything_is_written(run_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="'alerts' must be a list of channels"):
        Watcher(PARAMETERS, run_dir=run_dir, alerts=[7])  # type: ignore[list-item]  # on purpose
    assert not run_dir.exists()
