"""Real trainings that are killed, stopped, or finish, watched from another process's point of view."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gradwatch.errors import ConfigurationError
from gradwatch.testing import write_run
from gradwatch.watchdog import Limits, Watchdog, watch_root
from tests.alerts.receivers import Collector, wait_until

#: Steps every few milliseconds, or none after `hang` steps; ends at once when told so.
TRAINING = """
import sys, time, numpy as np
from gradwatch.records import Parameter
from gradwatch.watcher import Watcher
run_dir, steps, hang = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Watcher([Parameter("fc.weight")], run_dir=run_dir, flush_seconds=0.1) as watcher:
    for step in range(steps):
        watcher.observe(grad_norm=np.ones(1), loss=1.0)
        time.sleep(600 if step == hang else 0.01)
"""
EVERY = 0.1
#: A process that takes steps gives a sign of life every 0.1 s here, so two seconds without one are many.
QUICK = Limits(silence=4.0, stall=10.0, stall_seconds=4.0)


@contextmanager
def training(run_dir: Path, *, steps: int = 10**6, hang: int = -1) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [sys.executable, "-c", TRAINING, str(run_dir), str(steps), str(hang)]
    with subprocess.Popen(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def watched(root: Path, limits: Limits = QUICK) -> Iterator[Collector]:
    collector, stop = Collector(), threading.Event()
    thread = threading.Thread(
        target=watch_root, args=(root, [collector]), kwargs={"every": EVERY, "limits": limits, "stop": stop}
    )
    thread.start()
    try:
        yield collector
    finally:
        stop.set()
        thread.join()


def has_steps(run_dir: Path) -> Callable[[], bool]:
    return lambda: any(path.stat().st_size > 2000 for path in run_dir.glob("steps/*"))


def test_a_killed_training_alerts_within_two_looks_and_the_grouping(tmp_path: Path) -> None:
    with watched(tmp_path) as collector, training(tmp_path / "mnist") as process:
        wait_until(has_steps(tmp_path / "mnist"))
        time.sleep(3 * EVERY)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed = time.monotonic()
        wait_until(lambda: collector.messages, seconds=2.0 + 2 * EVERY + collector.routing.group_seconds)
        assert time.monotonic() - killed < 3

    [message] = collector.messages
    assert message.title == f"[CRITICAL] {tmp_path.name}: mnist died"
    assert f"process {process.pid}" in message.text
    assert str(tmp_path / "mnist") in message.text


def test_a_stopped_training_alerts_within_the_silence_and_says_when_it_goes_on(tmp_path: Path) -> None:
    with watched(tmp_path) as collector, training(tmp_path / "mnist") as process:
        wait_until(has_steps(tmp_path / "mnist"))
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: collector.messages, seconds=QUICK.silence + 3.0)
        assert time.monotonic() - stopped >= QUICK.silence - 1
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: len(collector.messages) == 2)

    assert [m.title for m in collector.messages] == [
        f"[CRITICAL] {tmp_path.name}: mnist froze",
        f"[RESOLVED] {tmp_path.name}: mnist froze",
    ]


@pytest.mark.slow
def test_a_training_that_takes_no_step_alerts_although_it_lives(tmp_path: Path) -> None:
    limits = Limits(silence=60.0, stall_seconds=2.0)
    with watched(tmp_path, limits) as collector, training(tmp_path / "mnist", hang=100):
        wait_until(lambda: collector.messages)

    assert collector.messages[0].title == f"[CRITICAL] {tmp_path.name}: mnist stall"


def test_a_training_that_finishes_never_alerts(tmp_path: Path) -> None:
    with watched(tmp_path, Limits(silence=0.5, stall_seconds=0.5)) as collector:
        for name in ("a", "b", "c"):
            with training(tmp_path / name, steps=30) as process:
                assert process.wait(60) == 0
        time.sleep(1.5)

    assert [message.title for message in collector.messages] == []


def test_a_training_that_ends_by_an_error_alerts_when_it_was_seen_running(tmp_path: Path) -> None:
    program = TRAINING + "    raise RuntimeError('out of memory')\n"
    with watched(tmp_path) as collector:
        arguments = [sys.executable, "-c", program, str(tmp_path / "mnist"), "100", "-1"]
        subprocess.run(arguments, check=False, capture_output=True)
        wait_until(lambda: collector.messages)

    assert "ended by an error: RuntimeError: out of memory" in collector.messages[0].text


def test_runs_that_ended_long_ago_are_left_alone(tmp_path: Path) -> None:
    for status in ("finished", "crashed", "running"):  # the last says it runs, and nobody holds its lock
        write_run(tmp_path / status, steps=10, parameters=1, status=status)
    time.sleep(0.05)

    assert list(Watchdog(tmp_path, Limits(max_age=0.01)).look()) == []
    assert [found.rule for found in Watchdog(tmp_path, Limits()).look()] == ["died"]


def test_a_run_that_died_today_is_told_of_when_the_watchdog_starts_later(tmp_path: Path) -> None:
    with training(tmp_path / "mnist") as process:
        wait_until(has_steps(tmp_path / "mnist"))
        process.kill()
        process.wait()
        [found] = Watchdog(tmp_path, Limits()).look()

    assert found.rule == "died"


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")

    assert list(Watchdog(tmp_path, Limits()).look()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"root": "missing"}, "'root' must be a directory: 'missing'"),
        ({"channels": []}, "'channels' must be at least one channel"),
        ({"every": 0}, "'every' must be > 0: 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, object], words: str) -> None:
    given = {"root": tmp_path, "channels": [Collector()], **arguments}
    with pytest.raises(ConfigurationError, match=words):
        watch_root(**given)  # type: ignore[arg-type]


def test_a_bad_limit_is_named() -> None:
    with pytest.raises(ConfigurationError, match="'silence' must be > 0: 0"):
        Limits(silence=0)
