"""Training that stands still, seen from inside the process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from gradwatch.alerts import Call, Message, Routing
from gradwatch.alerts.stall import StallWatch
from gradwatch.records import Parameter
from gradwatch.watcher import Watcher
from tests.alerts.receivers import wait_until


def beaten(steps: int, gap: float, **routing: float) -> StallWatch:
    """Steps at a steady pace; the last ends at `gap * (steps - 1)`."""
    watch = StallWatch(Routing.of(routing))
    for step in range(steps):
        watch.beat(step * gap, step, 1)
    return watch


def test_ten_median_steps_without_a_step_are_a_stall() -> None:
    watch = beaten(50, 30.0)

    assert watch.look(49 * 30.0 + 299)[0] is None
    found, _ = watch.look(49 * 30.0 + 300)
    assert found is not None
    assert (found.rule, found.severity, found.first_step) == ("stall", "critical", 49)
    assert "No step has ended for 300 s, after step 49" in found.message


def test_it_is_told_once_and_resolved_by_the_next_step() -> None:
    watch = beaten(50, 30.0)
    watch.look(5000.0)
    assert watch.look(6000.0)[0] is None
    watch.beat(6001.0, 50, 1)

    found, _ = watch.look(6002.0)
    assert found is not None
    assert found.resolved_step == 50


def test_a_short_pause_of_fast_steps_is_none() -> None:
    assert beaten(50, 0.01).look(0.49 + 59)[0] is None
    assert beaten(50, 0.01).look(0.49 + 61)[0] is not None


def test_a_pause_as_long_as_one_before_is_none() -> None:
    watch = beaten(50, 0.01)
    watch.beat(500.0, 50, 1)
    for step in range(51, 80):
        watch.beat(500.0 + step, step, 1)

    assert watch.look(579.0 + 900)[0] is None
    assert watch.look(579.0 + 1000)[0] is not None


def test_steps_that_come_in_batches_are_no_stall() -> None:
    watch = StallWatch(Routing(stall_seconds=0))
    for i in range(20):
        watch.beat(i * 50.0, i * 50, 50)

    assert watch.limit() == 100.0
    assert watch.look(19 * 50.0 + 59)[0] is None


def test_too_few_steps_and_no_limit_are_silent() -> None:
    assert beaten(4, 1.0).look(1e6)[0] is None
    assert StallWatch(Routing(stall=None)).look(1e6) == (None, float("inf"))


def test_a_watcher_that_gets_no_steps_alerts_and_says_when_they_come_again(run_dir: Path) -> None:
    got: list[Message] = []
    channel = Call(got.append, group_seconds=0.0, stall_seconds=0.3)
    with Watcher([Parameter("fc.weight")], run_dir=run_dir, alerts=[channel]) as watcher:
        for _ in range(20):
            watcher.observe(grad_norm=np.ones(1))
            time.sleep(0.01)
        wait_until(lambda: len(got) == 1)
        for _ in range(3):
            watcher.observe(grad_norm=np.ones(1))
        wait_until(lambda: len(got) == 2)

    assert [(message.groups[0].rule, message.is_resolved) for message in got] == [("stall", False), ("stall", True)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gradwatch")]
