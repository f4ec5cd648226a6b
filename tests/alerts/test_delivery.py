"""What happens when a receiver is slow, wrong, or gone: tried again, one thread, no secret, no harm to the training."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch import alerts
from gradwatch.alerts import courier
from gradwatch.alerts.command import Command
from gradwatch.errors import ConfigurationError
from gradwatch.records import ActionRecord, Parameter, StepBatch
from tests.alerts.receivers import INFO, Collector, Receiver, finding, receiver, wait_until

SECRET = "hunter2"  # noqa: S105 -- made up
FAST: dict[str, Any] = {"group_seconds": 0.0, "cooldown": 0.0, "reminder": None, "close_seconds": 5.0}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "FIRST_RETRY", 0.02)
    monkeypatch.setattr(courier, "LAST_RETRY", 0.1)


@pytest.fixture
def server() -> Iterator[Receiver]:
    with receiver() as made:
        yield made


def hook(server: Receiver, **settings: Any) -> alerts.Webhook:
    return alerts.Webhook(
        f"http://127.0.0.1:{server.port}/{SECRET}", secret=SECRET, **{"timeout": 5.0, **FAST, **settings}
    )


def batch(step: int, norm: float = 1.0) -> StepBatch:
    parameters = (Parameter("conv1.weight"),)
    return StepBatch(parameters, np.array([step]), np.ones((1, 1), np.float32), {"global_norm": np.array([norm])})


@pytest.mark.parametrize("behave", ["refuse", "redirect", "cut"])
def test_a_delivery_that_fails_is_tried_again_with_the_same_id(server: Receiver, tmp_path: Path, behave: str) -> None:
    server.behave = behave
    channel = hook(server)
    channel.open(INFO, tmp_path)
    channel.finding(finding())
    wait_until(lambda: server.tried >= 3)
    server.behave = "ok"
    wait_until(lambda: server.messages)
    channel.close()

    assert len(server.messages) == 1
    assert server.requests[0][0]["X-Gradwatch-Id"] == server.messages[0]["id"]


def test_a_slow_receiver_gets_everything(server: Receiver, tmp_path: Path) -> None:
    server.behave = "slow"
    channel = hook(server)
    channel.open(INFO, tmp_path)
    for rule in ("nonfinite", "spike", "dead"):
        channel.finding(finding(f"{rule}@1"))
    channel.close()

    assert {group["rule"] for message in server.messages for group in message["groups"]} == {
        "nonfinite",
        "spike",
        "dead",
    }


def test_a_hanging_receiver_is_given_up_and_tried_again(server: Receiver, tmp_path: Path) -> None:
    server.behave = "hang"
    channel = hook(server, timeout=0.2)
    channel.open(INFO, tmp_path)
    channel.finding(finding())
    wait_until(lambda: server.tried >= 2)
    server.behave = "ok"
    server.released.set()
    wait_until(lambda: server.messages)
    channel.close()


def test_a_receiver_that_is_not_there_loses_nothing_until_it_comes(tmp_path: Path) -> None:
    collector = Collector()
    collector.fails = 5
    collector.open(INFO, tmp_path)
    collector.finding(finding("nonfinite@1"))
    wait_until(lambda: collector.tried >= 2)
    collector.finding(finding("spike@2"))
    wait_until(lambda: len(collector.messages) == 2)
    collector.close()

    assert [message.groups[0].rule for message in collector.messages] == ["nonfinite", "spike"]


def test_a_refused_connection_is_logged_once_without_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    channel = alerts.Webhook(f"http://me:{SECRET}@127.0.0.1:{port}/{SECRET}", secret=SECRET, **FAST)
    with caplog.at_level(logging.DEBUG):
        channel.open(INFO, tmp_path)
        channel.finding(finding())
        time.sleep(0.3)
        channel.close()

    lines = [record.getMessage() for record in caplog.records if record.name == "gradwatch"]
    assert sum("cannot deliver" in line for line in lines) == 1
    assert any("could not deliver" in line for line in lines)
    assert SECRET not in caplog.text


def test_tls_that_fails_is_a_failure_like_others(server: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    [outcome] = alerts.alert_test([alerts.Webhook(f"https://127.0.0.1:{server.port}/{SECRET}", timeout=5.0)])

    assert "SSL" in outcome.error
    assert SECRET not in outcome.error + caplog.text


def test_a_lost_last_message_is_noted(tmp_path: Path) -> None:
    notes: list[Any] = []
    collector = Collector()
    collector.fails = 10**6
    collector.open(INFO, tmp_path, note=lambda _, data: notes.append(data["state"]))
    collector.finding(finding())
    collector.close()

    assert notes == ["lost"]


def test_close_does_not_wait_for_a_receiver_that_hangs(
    server: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.behave = "hang"
    channel = hook(server, timeout=20.0, close_seconds=0.2)
    channel.open(INFO, tmp_path)
    channel.finding(finding())
    wait_until(lambda: server.tried)
    channel.close()
    server.released.set()

    assert "did not answer in time" in caplog.text
    wait_until(lambda: not any(thread.name == "gradwatch-Webhook" for thread in threading.enumerate()))


@pytest.mark.slow
def test_a_million_findings_are_a_few_messages_and_the_first_is_among_them(tmp_path: Path) -> None:
    collector = Collector(group_seconds=0.05, cooldown=0.5, reminder=None)
    collector.open(INFO, tmp_path)
    collector.finding(finding("nonfinite@first"))
    layers, one = tuple(f"layer{i}" for i in range(64)), finding("exploding@0")
    fields = {name: getattr(one, name) for name in one.__dataclass_fields__ if name not in ("id", "layers")}
    for i in range(1_000_000):
        collector.finding(type(one)(id=f"exploding@{i}", layers=(layers[i % 64],), **fields))
    collector.close()

    assert len(collector.messages) <= collector.routing.per_hour + 2
    groups = [group for message in collector.messages for group in message.groups]
    assert {"nonfinite", "exploding"} == {group.rule for group in groups}
    assert sum(group.count for group in groups if group.rule == "exploding") == 1_000_000


def test_what_was_done_is_told_with_the_rule(tmp_path: Path) -> None:
    collector = Collector(group_seconds=0.3)
    collector.open(INFO, tmp_path)
    collector.finding(finding())
    collector.action(ActionRecord("1", 8, "DecayLR", detail="learning rate x 0.5", reason="exploding"))
    collector.action(ActionRecord("2", 8, "Clip", detail="not really", reason="exploding", dry_run=True))
    collector.close()

    assert collector.messages[0].groups[0].done == ("DecayLR, step 8: learning rate x 0.5",)
    assert "Done: DecayLR" in collector.messages[0].text


def test_a_message_says_what_a_person_needs(tmp_path: Path) -> None:
    collector = Collector()
    collector.open(INFO, tmp_path / "mnist", first_step=3)
    for step in range(10, 30):
        collector.steps(batch(step, norm=2.0**step))
    collector.finding(finding("exploding@5"))
    collector.close()

    [message] = collector.messages
    for words in (
        "exploding",
        "conv1",
        "Cause: a rate too high",
        "Advice: lower it",
        "gpu7",
        "4711",
        "step 29",
        str(tmp_path),
    ):
        assert words in message.text
    assert message.plot is not None
    assert message.plot.startswith(b"\x89PNG")


def test_names_cannot_forge_lines(tmp_path: Path) -> None:
    collector = Collector()
    collector.open(INFO, tmp_path / "a\r\nBcc: all")
    collector.finding(finding(layers=("conv\nX",), message="one\ntwo"))
    collector.close()

    [message] = collector.messages
    assert "\n" not in message.title
    assert "\nBcc" not in message.text
    assert "\nX" not in message.text
    assert "one two" in message.text


def test_a_signed_message_is_known_and_a_changed_one_is_not(server: Receiver) -> None:
    alerts.alert_test([hook(server)])
    [(headers, body)] = server.requests

    assert alerts.verify_signature(SECRET, headers, body)
    assert not alerts.verify_signature("another", headers, body)
    assert not alerts.verify_signature(SECRET, headers, body + b" ")
    assert not alerts.verify_signature(SECRET, headers, body, now=time.time() + 301)
    assert not alerts.verify_signature(SECRET, {}, body)


def test_the_json_of_a_message_has_the_documented_fields(server: Receiver) -> None:
    alerts.alert_test([hook(server)])
    [message] = server.messages
    documented = (Path(__file__).parent.parent.parent / "docs" / "alerts.md").read_text()

    assert message["schema"] == "gradwatch.alert/1"
    for field in [*message, *message["groups"][0]]:
        assert f"`{field}`" in documented, field


def test_a_command_that_hangs_is_killed_with_its_children() -> None:
    child = "import time; time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    [outcome] = alerts.alert_test([Command([sys.executable, "-c", program], timeout=1.0)])

    assert "took longer than 1 s and was killed" in outcome.error
    assert time.monotonic() - started < 30


def test_a_command_that_fails_says_why() -> None:
    [outcome] = alerts.alert_test([Command([sys.executable, "-c", "import sys; sys.exit('no route')"])])

    assert "ended with status 1: no route" in outcome.error


def test_a_command_finds_the_facts_in_its_arguments_and_environment(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = "import os, sys; open(sys.argv[1], 'w').write(sys.argv[2] + os.environ['GRADWATCH_SEVERITY'])"
    alerts.alert_test([Command([sys.executable, "-c", program, str(out), "{title}|"])])

    assert out.read_text() == "[TEST] alert-test: this channel works|info"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: alerts.Webhook(f"ftp://{SECRET}@host"), "'url' must be an https:// or http:// address"),
        (lambda: alerts.Webhook("https://"), "'url' must be an https:// or http:// address"),
        (lambda: alerts.Webhook("https://host", timeout=0), "'timeout' must be > 0: 0"),
        (lambda: alerts.Command("notify-send"), "'arguments' must be a list"),
        (lambda: alerts.Command([]), "'arguments' must be a list"),
        (lambda: alerts.Call("print"), "'function' must be callable: 'print'"),  # type: ignore[arg-type]
        (lambda: alerts.as_channels("log"), "'alerts' must be a list of channels"),
        (lambda: alerts.as_channels([alerts.Log]), r"Log is a class; write Log\(...\)"),
        (
            lambda: alerts.as_channels([3]),
            "'alerts' must be a list of channels, functions of a message, or their names",
        ),
    ],
)
def test_bad_input_is_named_without_its_secrets(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        make()
    assert SECRET not in str(caught.value)


def test_words_and_functions_become_channels() -> None:
    made = alerts.as_channels(["log", "console", "command:echo hello", "https://example.org/x", print])

    assert list(map(repr, made)) == [
        "Log('gradwatch.alerts')", "Console()", "Command('echo')", "Webhook('https://example.org')", "Call(print)",
    ]  # fmt: skip


def test_the_environment_names_channels() -> None:
    made = alerts.channels_from_environment(
        {"GRADWATCH_ALERTS": "log\n https://example.org/x "}, min_severity="critical"
    )

    assert [type(channel).__name__ for channel in made] == ["Log", "Webhook"]
    assert made[1].routing.min_severity == "critical"
