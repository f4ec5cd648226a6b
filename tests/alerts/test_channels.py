"""What every channel keeps to, against receivers that are there."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gradwatch import alerts
from gradwatch.errors import ConfigurationError
from gradwatch.records import ActionRecord
from tests.alerts.receivers import INFO, finding, receiver, wait_until

SECRET = "hunter2"  # noqa: S105 -- made up
FAST: dict[str, Any] = {"group_seconds": 0.2, "cooldown": 0.0, "reminder": None, "stall": None}


@dataclass
class Rig:
    """A channel and how to read what arrived at its other end."""

    channel: alerts.Channel
    titles: Callable[[], list[str]]


@contextmanager
def call(*_: Any) -> Iterator[Rig]:
    got: list[alerts.Message] = []
    yield Rig(alerts.Call(got.append, **FAST), lambda: [message.title for message in got])


@contextmanager
def log(*_: Any) -> Iterator[Rig]:
    handler = logging.Handler()
    records: list[logging.LogRecord] = []
    handler.emit = records.append  # type: ignore[assignment,method-assign]
    logger = logging.getLogger("a.logger.of.the.test")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield Rig(alerts.Log(logger, **FAST), lambda: [record.getMessage().split("\n")[0] for record in records])
    logger.removeHandler(handler)


@contextmanager
def command(folder: Path, _: Any) -> Iterator[Rig]:
    out = folder / "received"
    program = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write(sys.stdin.read() + '\\n')"
    channel = alerts.Command([sys.executable, "-c", program, str(out), f"--token={SECRET}"], **FAST)
    yield Rig(channel, lambda: _titles(out.read_text().splitlines() if out.exists() else []))


@contextmanager
def webhook(*_: Any) -> Iterator[Rig]:
    with receiver() as server:
        url = f"http://me:{SECRET}@127.0.0.1:{server.port}/hook?token={SECRET}"
        yield Rig(alerts.Webhook(url, secret=SECRET, **FAST), lambda: [m["title"] for m in server.messages])


@contextmanager
def console(_: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    screen, shown = request.getfixturevalue("capsys"), list[str]()

    def titles() -> list[str]:
        shown.append(screen.readouterr().err)
        return _boxed("".join(shown))

    yield Rig(alerts.Console(**FAST), titles)


@contextmanager
def apprise(*_: Any) -> Iterator[Rig]:
    with receiver() as server:
        url = f"json://me:{SECRET}@127.0.0.1:{server.port}/{SECRET}"
        yield Rig(alerts.Apprise(url, **FAST), lambda: [m["title"] for m in server.messages])


def _titles(lines: list[str]) -> list[str]:
    return [json.loads(line)["title"] for line in lines]


def _boxed(text: str) -> list[str]:
    return [line.strip("+- ") for line in text.splitlines() if line.startswith("+- [")]


WITH_APPRISE = pytest.mark.needs("alerts")
CHANNELS = [call, log, command, webhook, console, pytest.param(apprise, marks=WITH_APPRISE)]


@pytest.fixture(params=CHANNELS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with request.param(tmp_path, request) as made:
        yield made


def test_firing_and_resolved_arrive_once_each(rig: Rig, tmp_path: Path) -> None:
    rig.channel.open(INFO, tmp_path / "mnist")
    for _ in range(3):
        rig.channel.finding(finding("exploding@5"))
    wait_until(rig.titles)
    rig.channel.finding(finding("exploding@5", resolved=9))
    wait_until(lambda: len(rig.titles()) == 2)
    rig.channel.close()

    assert rig.titles() == ["[CRITICAL] mnist: exploding in conv1", "[RESOLVED] mnist: exploding in conv1"]


def test_forty_layers_at_once_are_one_message(rig: Rig, tmp_path: Path) -> None:
    rig.channel.open(INFO, tmp_path / "mnist")
    for i in range(40):
        rig.channel.finding(finding(f"exploding@5#{i}", layers=(f"conv{i}",)))
    rig.channel.close()

    assert rig.titles() == ["[CRITICAL] mnist: exploding in conv0 and 39 more layers"]


def test_closing_tells_what_waits(rig: Rig, tmp_path: Path) -> None:
    rig.channel.open(INFO, tmp_path / "mnist")
    rig.channel.finding(finding())
    rig.channel.close()

    assert len(rig.titles()) == 1


def test_a_training_that_ends_by_an_error_is_told(rig: Rig, tmp_path: Path) -> None:
    rig.channel.open(INFO, tmp_path / "mnist")
    rig.channel.close("crashed", "RuntimeError: out of memory")

    assert rig.titles() == ["[CRITICAL] mnist: crashed"]


def test_a_training_that_finishes_is_silent(rig: Rig, tmp_path: Path) -> None:
    rig.channel.open(INFO, tmp_path / "mnist")
    rig.channel.close("finished", "")

    assert rig.titles() == []


def test_a_stop_is_told_and_not_told_as_a_crash_too(rig: Rig, tmp_path: Path) -> None:
    rig.channel.open(INFO, tmp_path / "mnist")
    rig.channel.action(ActionRecord("1", 8, "Stop", detail="the loss diverged", reason="divergence"))
    rig.channel.close("crashed", "StopTraining: the loss diverged")

    assert rig.titles() == ["[CRITICAL] mnist: Stop"]


def test_what_is_not_wanted_is_not_told(rig: Rig, tmp_path: Path) -> None:
    rig.channel.open(INFO, tmp_path / "mnist")
    rig.channel.finding(finding("plateau@1", severity="info"))
    rig.channel.close()

    assert rig.titles() == []


def test_before_opening_and_after_closing_nothing_happens(rig: Rig, tmp_path: Path) -> None:
    rig.channel.finding(finding())
    rig.channel.action(ActionRecord("1", 8, "Stop"))
    rig.channel.close()
    rig.channel.open(INFO, tmp_path / "mnist")
    rig.channel.close()
    rig.channel.close()
    rig.channel.finding(finding())

    assert rig.titles() == []


def test_a_channel_serves_one_run_at_a_time(rig: Rig, tmp_path: Path) -> None:
    rig.channel.open(INFO, tmp_path / "mnist")
    with pytest.raises(ConfigurationError, match="serves another run: give each run a channel of its own"):
        rig.channel.open(INFO, tmp_path / "other")
    rig.channel.close()


def test_only_rank_zero_tells(rig: Rig, tmp_path: Path) -> None:
    from dataclasses import replace

    rig.channel.open(replace(INFO, rank=1), tmp_path / "mnist")
    rig.channel.finding(finding())
    rig.channel.close()

    assert rig.titles() == []


def test_what_is_sent_is_noted_in_the_record(rig: Rig, tmp_path: Path) -> None:
    notes: list[tuple[str, Any]] = []
    rig.channel.open(INFO, tmp_path / "mnist", note=lambda kind, data: notes.append((kind, data)))
    rig.channel.finding(finding())
    rig.channel.close()

    [(kind, data)] = notes
    assert (kind, data["state"], data["rules"], data["severity"]) == ("alert", "sent", ["exploding"], "critical")
    assert SECRET not in json.dumps(data)


def test_a_test_message_arrives(rig: Rig) -> None:
    [outcome] = alerts.alert_test([rig.channel])

    assert outcome.is_sent
    assert rig.titles() == ["[TEST] alert-test: this channel works"]


def test_no_secret_is_shown(rig: Rig) -> None:
    assert SECRET not in repr(rig.channel)
